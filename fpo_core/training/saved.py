"""Is the model that was saved the one that was trained?"""

import json
from pathlib import Path

import torch

from fpo_core.data.batches import PairIds, collate
from fpo_core.errors import FPOError
from fpo_core.models.forward import forward_pairs
from fpo_core.models.load import inference_device, load_model
from fpo_core.training.job import LAST_FILE, MODEL_FOLDER
from fpo_core.training.start_gate import logp_tolerance


def check_saved(output: Path, attention: str) -> None:
    """Load the saved policy and compare its log-probs of one pair with the trained engine's.

    Args:
        output: where the workers wrote.
        attention: attention implementation of the run.

    Raises:
        FPOError: they differ by more than rounding.
    """
    last = json.loads((output / LAST_FILE).read_text())
    dtype = json.loads((output / MODEL_FOLDER / "config.json").read_text())["dtype"]
    device = inference_device()
    policy = load_model(output / MODEL_FOLDER, dtype=dtype, attention=attention, device=device)
    pair = PairIds(*last["pair"])  # without ranges where an earlier version wrote it
    with torch.no_grad():
        logps = forward_pairs(policy, collate([pair], device=device), ()).logps.tolist()
    for saved, trained, scored in zip(logps, last["logps"], pair.scored, strict=True):
        if not scored:
            continue
        allowed = float(logp_tolerance(dtype, torch.tensor(scored))) * scored
        if not abs(saved - trained) <= allowed:
            raise FPOError(
                f"the saved policy gives a response of pair {pair.pair_id} the log-prob "
                f"{saved:.4f}, the trained one {trained:.4f}: it was not saved rightly"
            )
