"""The method: tensors, models, losses, features, training, metrics. Knows no Prefect, no S3."""
