"""DPO and SimPO equal TRL's own trainers: losses, gradients and rewards of the same token ids.

The ids go straight into TRL's collators: from text its trainers make other tokens than we score,
for they append EOS, and SimPO's also puts BOS in front.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from fpo_core.data.batches import collate
from fpo_core.models.forward import forward_pairs
from fpo_core.objectives import Objective, SideScores, objective
from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.options import Options, objective_options
from fpo_core.recipe.training import TrainSettings
from tests.tiny import make_model, make_tokenizer

pytest.importorskip("trl")

POLICY, REFERENCE = 0, 1  # seeds
KINDS = pytest.mark.parametrize("kind", ["llama", "gemma2"])


def ours(kind: str, pairs, method: str, options: Options) -> tuple[Objective, Tensor, Tensor]:
    """The objective, log-probs [B, 2] as it takes them, and the mean loss's gradient."""
    policy, batch = make_model(kind, POLICY), collate(pairs)
    with torch.no_grad():
        reference = forward_pairs(make_model(kind, REFERENCE), batch, ()).logps
    logps = forward_pairs(policy, batch, ()).logps
    chosen, rejected = (
        SideScores(logps[side::2], reference[side::2], batch.lengths[side::2]) for side in (0, 1)
    )
    result = objective(METHODS[method], options, chosen, rejected)
    result.losses.mean().backward()
    scores = logps.detach() / (batch.lengths if method == "simpo" else 1)
    return result, scores.reshape(-1, 2), gradient(policy)


def gradient(model) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def settings(options: Options, folder: Path) -> dict[str, Any]:
    """What TRL's two configurations share: plain float32, and nothing written or reported."""
    return {
        "beta": options.beta, "output_dir": str(folder), "report_to": "none", "use_cpu": True,
        "bf16": False, "activation_checkpointing": False, "remove_unused_columns": False,
    }  # fmt: skip


def inputs(kind: str) -> dict[str, Any]:
    """What TRL's two trainers share; they insist on a data set, of which nothing is used."""
    return {
        "model": make_model(kind, POLICY).train(), "processing_class": make_tokenizer(),
        "train_dataset": Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    }  # fmt: skip


def compute(trainer, rows: list[dict]) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss of a batch, and what it logs of it."""
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    logs = {"loss": loss.item()}
    trainer.log(logs)
    return loss, logs


def check(trainer, rows: list[dict], wanted: dict[str, Tensor], our_gradient: Tensor) -> None:
    """Pair by pair, so that nothing cancels in a mean; then as one padded batch, with gradient."""
    with torch.no_grad():
        alone = [compute(trainer, [row])[1] for row in rows]
    for name, values in wanted.items():
        theirs = [logs[name] for logs in alone]
        assert values.tolist() == pytest.approx(theirs, rel=0, abs=1e-5), name
    loss, logs = compute(trainer, rows)
    for name, values in wanted.items():
        assert logs[name] == pytest.approx(values.mean().item(), rel=0, abs=1e-5), name
    loss.backward()
    theirs = gradient(trainer.model)
    assert (our_gradient - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@KINDS
@pytest.mark.parametrize("given", [{}, {"beta": 0.5}, {"beta": 2.0, "length_norm": True}])
def test_dpo(kind, given, pairs, tmp_path):
    """With ``length_norm`` it has FPO's difference and margin, which TRL calls sigmoid_norm."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    options = objective_options(TrainSettings(method="dpo", **given))
    loss_type = "sigmoid_norm" if options.per_token else "sigmoid"
    args = DPOConfig(**settings(options, tmp_path), loss_type=[loss_type])
    trainer = DPOTrainer(ref_model=make_model(kind, REFERENCE), args=args, **inputs(kind))
    rows = [
        {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
        for pair in pairs
    ]
    result, logps, our_gradient = ours(kind, pairs, "dpo", options)
    wanted = {
        "loss": result.losses, "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]
    }  # fmt: skip
    if not options.per_token:  # TRL logs the rewards of sums even then
        wanted["rewards/chosen"] = result.chosen_rewards
        wanted["rewards/rejected"] = result.rejected_rewards
        wanted["rewards/margins"] = result.u
    check(trainer, rows, wanted, our_gradient)


@KINDS
@pytest.mark.parametrize("given", [{}, {"beta": 0.7, "gamma": 1.2}, {"gamma": 0.0}])
def test_simpo(kind, given, pairs, tmp_path):
    """TRL takes gamma / beta from the difference of averages and multiplies by beta: our gamma."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    options = objective_options(TrainSettings(method="simpo", **given))
    args = CPOConfig(
        **settings(options, tmp_path), loss_type="simpo", simpo_gamma=options.gamma,
        cpo_alpha=0.0,  # weighs a likelihood term that CPO has and SimPO has not
    )  # fmt: skip
    trainer = CPOTrainer(args=args, **inputs(kind))
    rows = []
    for pair in pairs:
        row = {}
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = pair.prompt + response
            row[f"{side}_input_ids"], row[f"{side}_attention_mask"] = ids, [1] * len(ids)
            row[f"{side}_labels"] = [-100] * len(pair.prompt) + response
        rows.append(row)
    result, averages, our_gradient = ours(kind, pairs, "simpo", options)
    # Its rewards leave the reference out, which ours are relative to: the difference is the same.
    wanted = {
        "loss": result.losses, "rewards/margins": result.difference,
        "logps/chosen": averages[:, 0], "logps/rejected": averages[:, 1],
    }  # fmt: skip
    check(trainer, rows, wanted, our_gradient)
