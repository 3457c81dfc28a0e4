"""Library defaults for a tool that runs on other people's machines: no telemetry, little noise.

Each is only a default: what the user sets in the environment stands. Weights & Biases has none: it
does nothing until a recipe's ``monitor.wandb`` asks for it, and then as ``WANDB_MODE`` says.
"""

import logging
import os

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "WANDB_ERROR_REPORTING": "false",
    "ANONYMIZED_TELEMETRY": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_quiet_defaults() -> None:
    """Set the defaults; call before the libraries are imported."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # It has no setting for this, and warns of every CPU that it finds.
    logging.getLogger("DeepSpeed").addFilter(_only_errors)


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
