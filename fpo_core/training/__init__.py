"""Training: worker processes on a DeepSpeed engine, started and watched by the train stage."""
