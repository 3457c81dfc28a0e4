"""Figures on held-out pairs while the policy trains: what it learns, and whether the SAEs follow.

Measured before the first step, every ``heldout_steps`` and after the last, by all ranks together:
what a step logs, with the KL to the reference, whose model is loaded for this alone (objectives
that hold it live use that), and every SAE's FVU and L0 on the policy's activations. What FVU and L0
are on the pairs before the first step is the range they are expected to stay in; leaving it is told
once, and again when it happens after a return.

Nothing of the training changes: the policy runs without gradient and no random number is drawn.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpo_core.data.batches import collate
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.forward import reference_side
from fpo_core.models.load import load_model
from fpo_core.sae.health import Health, health_sums, sae_health, usual_range
from fpo_core.training.cached import cached_batch
from fpo_core.training.examples import Example
from fpo_core.training.job import HELDOUT_FILE, WARNINGS_FILE, TrainingJob
from fpo_core.training.live_reference import LiveReference
from fpo_core.training.loss import PairLoss, metric_sums

_NAMES = {"fvu": "FVU", "l0": "L0"}
_PARTS = ("", "_low", "_high", "_outside")  # of a quantity: its value, and how that compares


class HeldoutMonitor:
    """Measures the policy on held-out pairs and keeps the records.

    Args:
        job: the run, with its ``monitor`` settings; records up to ``job.resume`` are gone on from.
        loss: the objective with its SAEs, decoders included.
        examples: the held-out pairs, at least one.
        micro_batches: groups a rank's pairs into batches, as many on every rank.
        device: torch device of the policy.
    """

    def __init__(
        self,
        job: TrainingJob,
        loss: PairLoss,
        examples: Sequence[Example],
        micro_batches: Callable[[list[Example]], list[list[int]]],
        device: str,
    ) -> None:
        assert job.monitor is not None
        self.job, self.loss, self.every = job, loss, job.monitor.heldout_steps
        self.examples, self._micro_batches, self.device = examples, micro_batches, device
        self.records = read_records(job)
        self._told = False  # that there is no range

    def after_step(
        self, engine: Any, step: int, *, last: bool, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Measure where it is due; a collective.

        Args:
            engine: the DeepSpeed engine.
            step: steps done.
            last: no step follows.
            stop: whether this rank was told to stop. The measurement is then given up, for who
                goes on from here to make; the first one of a run is not, as nothing would be left
                to compare with, nor the last, which no one would make.
        """
        done = bool(self.records) and self.records[-1]["step"] == step
        if done or not (last or step % self.every == 0):
            return
        may_give_up = bool(self.records) and not last
        found = self._measure(engine, stop if may_give_up else lambda: False)
        if self.device != "cpu":
            torch.cuda.empty_cache()  # what the reference model took is training's again
        if found is None:
            return
        record = {
            "step": step,
            "pairs": len(self.examples),
            **found[0],
            **self._health(step, found[1]),
        }
        if torch.distributed.get_rank() == 0:
            self._write(record)
        self.records.append(record)

    def _measure(
        self, engine: Any, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], list[dict[str, Health]]] | None:
        """Means over the pairs, and each SAE's health; None when any rank was told to stop."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        by_length = sorted(
            range(len(self.examples)), key=lambda row: -self.examples[row].ids.length
        )
        mine = by_length[rank::world]
        # Loaded for this measurement; the last reference to it goes with this frame.
        reference = self.loss.reference or self._load_reference()
        totals: dict[str, float] = {}
        health = [
            torch.zeros(
                len(self.examples), 4 + sae.coder.d_in, dtype=torch.float64, device=self.device
            )
            for sae in self.loss.saes
        ]
        for rows in self._micro_batches([self.examples[row] for row in mine]):
            if _on_any_rank(stop(), self.device):
                return None
            # A rank that has no pairs left runs any pair, and counts nothing of it.
            pairs = [mine[row] for row in rows] or [0]
            sums = self._batch(engine, reference, pairs, health if rows else [])
            counted = 1.0 if rows else 0.0
            totals = {name: totals.get(name, 0.0) + counted * sums[name] for name in sums}
        summed = torch.tensor(list(totals.values()), dtype=torch.float64, device=self.device)
        for tensor in (summed, *health):
            torch.distributed.all_reduce(tensor)
        means = (summed / len(self.examples)).tolist()
        return dict(zip(totals, means, strict=True)), [sae_health(sums) for sums in health]

    @torch.no_grad()
    def _batch(
        self,
        engine: Any,
        reference: LiveReference,
        pairs: Sequence[int],
        health: Sequence[Tensor],
    ) -> dict[str, float]:
        """Sums of a micro-batch's metrics; its SAE sums are added to ``health`` [P, 4 + d] each."""
        examples = [self.examples[pair] for pair in pairs]
        batch = collate([example.ids for example in examples], device=self.device)
        # Past the engine's own forward, which would prepare a backward.
        out = engine.module(batch, reference(batch))
        cached = cached_batch(examples, self.device, self.job.settings.pinned)
        loss = self.loss(batch, out, cached)
        owner = torch.tensor(pairs, device=self.device)[batch.response // 2]
        for sums, sae, x in zip(health, self.loss.saes, out.activations, strict=False):
            sums += health_sums(sae.coder, x, owner, len(self.examples))
        return metric_sums(loss, self.job.settings)

    def _load_reference(self) -> LiveReference:
        """Whole on every rank, also under ZeRO-3: it is there for a moment."""
        model = load_model(
            self.job.model_folder, dtype=self.job.reference_dtype, attention=self.job.attention,
            device=self.device,
        )  # fmt: skip
        return functools.partial(reference_side, model)

    def _health(self, step: int, found: Sequence[dict[str, Health]]) -> dict[str, Any]:
        """Each SAE's quantities with the range of step 0, and whether they are outside of it."""
        columns: dict[str, Any] = {}
        for sae, quantities in zip(self.job.saes, found, strict=True):
            for quantity, health in quantities.items():
                low, high = (
                    usual_range(health) if step == 0 else self._range(quantity, sae.hookpoint)
                )
                outside = None if low is None or high is None else not low <= health.value <= high
                values = (health.value, low, high, outside)
                columns |= {
                    column(quantity + part, sae.hookpoint): value
                    for part, value in zip(_PARTS, values, strict=True)
                }
        return columns

    def _range(self, quantity: str, hookpoint: Hookpoint) -> tuple[float | None, float | None]:
        """Step 0's range; none where that was not measured, or on another number of pairs."""
        first = self.records[0] if self.records else {"step": None}
        if first["step"] != 0 or first["pairs"] != len(self.examples):
            return None, None
        low, high = (first[column(f"{quantity}_{end}", hookpoint)] for end in ("low", "high"))
        return low, high

    def _write(self, record: dict[str, Any]) -> None:
        """Log a record, and an alarm for each quantity that has left its range since the last."""
        before = self.records[-1] if self.records else {}
        compared = True
        with (self.job.output / HELDOUT_FILE).open("a") as log:
            log.write(json.dumps(record) + "\n")
        for sae in self.job.saes:
            for quantity, said in _NAMES.items():
                value, low, high, outside = (
                    record[column(quantity + part, sae.hookpoint)] for part in _PARTS
                )
                compared &= outside is not None
                if outside and not before.get(column(f"{quantity}_outside", sae.hookpoint)):
                    self._warn(
                        f"after step {record['step']} the {said} of the SAE at {sae.hookpoint} is "
                        f"{value:.4g} on the policy's activations of held-out pairs, outside of "
                        f"{low:.4g} to {high:.4g}, its range before training: what the SAE says of "
                        f"the policy's features may not hold any more"
                    )
        if not compared and not self._told:
            self._told = True
            self._warn(
                "FVU and L0 of the SAEs have no range to stay in: this run was begun without "
                "monitor.heldout_steps, or with another number of held-out pairs"
            )

    def _warn(self, told: str) -> None:
        with (self.job.output / WARNINGS_FILE).open("a") as warnings:
            warnings.write(told + "\n")


def _on_any_rank(wish: bool, device: str) -> bool:
    agreed = torch.tensor(float(wish), device=device)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
    return bool(agreed)


def read_records(job: TrainingJob) -> list[dict[str, Any]]:
    """The held-out records that a run to be resumed had made; none in a new run."""
    file = job.resume / HELDOUT_FILE if job.resume else None
    if file is None or not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def column(quantity: str, hookpoint: Hookpoint) -> str:
    """A quantity of an SAE as the records name it, e.g. ``fvu.25-resid_post``."""
    return f"{quantity}.{hookpoint.layer}-{hookpoint.site}"


def heldout_line(record: dict[str, Any]) -> str:
    """A record in one line for people."""
    when = f"after step {record['step']}" if record["step"] else "before training"
    parts = [f"{name} {record[name]:.3f}" for name in ("loss", "accuracy", "margin")]
    for label, name in (("KL", "kl"), ("discrepancy", "discrepancy")):
        chosen, rejected = record[f"{name}_chosen"], record[f"{name}_rejected"]
        parts.append(f"{label} {chosen:.3g} chosen, {rejected:.3g} rejected")
    for quantity, said in _NAMES.items():
        values = [
            f"{value:.4g}" for name, value in record.items() if name.startswith(f"{quantity}.")
        ]  # fmt: skip
        if values:
            parts.append(f"{said} {' and '.join(values)}")
    return f"held-out {when}: {', '.join(parts)}"
