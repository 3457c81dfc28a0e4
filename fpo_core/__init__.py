"""The method: tensors, models, losses, features, training, metrics. Knows no Prefect, no S3."""

from fpo_core.own_names import claim

claim()  # first: a folder on the path may have a storage.py or tasks.py of its own
