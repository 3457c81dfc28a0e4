"""Training that is killed, stopped and resumed, in real DeepSpeed workers."""

import json
import math
import os
import shutil
import signal

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from fpo_core.data.batches import PairIds, collate
from fpo_core.errors import FPOError, Preempted
from fpo_core.models.forward import scored_activations
from fpo_core.models.load import load_model
from fpo_core.recipe.schema import MonitorSettings
from fpo_core.recipe.training import TrainSettings
from fpo_core.sae.coder import load_coder
from fpo_core.training.checkpoint import is_complete
from fpo_core.training.engine import lr_factor, make_engine, start_distributed
from fpo_core.training.launch import run_workers
from tests.fpo_core.workers import FIRST, job, train, worker_processes
from tests.tiny import make_model

SAVING = {"checkpoint_minutes": 0.0}


def run(spec, ranks, on_step=lambda _record: None):
    records = []

    def step(record):
        records.append(record)
        on_step(record)

    run_workers(spec, ranks, step)
    return records, load_file(spec.output / "model" / "model.safetensors")


def killed(spec, ranks, at_step, how=signal.SIGKILL):
    """Run until a step is logged, and send a signal to one rank."""

    def on_step(record):
        if record["step"] == at_step:
            pids = [
                pid
                for pid, line in worker_processes(spec.output)
                if "torch.distributed.run" not in line
            ]
            os.kill(pids[-1], how)

    with pytest.raises(FPOError) as error:
        run(spec, ranks, on_step)
    return error.value


def read_heldout(spec):
    return [json.loads(line) for line in (spec.output / "heldout.jsonl").read_text().splitlines()]


def health_of_the_reference(root, pairs):
    """FVU and L0 of the first held-out pairs, each row of a batch by itself, by the definition."""
    rows = [r for r in pq.read_table(root / "pairs.parquet").to_pylist() if r["split"] == "heldout"]
    model = load_model(root / "model", dtype="float32", attention="sdpa")
    coder = load_coder(root / "sae")
    found = []
    for row in rows[:pairs]:
        ids = PairIds(row["pair_id"], row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        found += scored_activations(model, collate([ids]), (FIRST,))
    x = torch.cat(found)
    acts = coder.encode(x)
    error = (x - coder.decode(acts)).double().square().sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    return {
        "fvu.1-resid_post": float(error / variance),
        "l0.1-resid_post": float((acts > 0).sum() / len(x)),
    }


def newest(spec):
    return max(folder for folder in spec.checkpoints.glob("step-*") if is_complete(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings", "offload"),
    [
        (
            2,
            {"method": "fpo", "zero_stage": 2, "schedule": "cosine", "optimizer": "adamw"},
            "optimizer",
        ),
        (2, {"method": "tdpo2", "zero_stage": 3, "optimizer": "rmsprop"}, "all"),
    ],
)
def test_killed_training_resumes_to_the_same_bytes(
    heldout_caches, tmp_path, ranks, settings, offload
):
    """SIGKILL to one rank in mid-run, resumed from what it had saved: weights and loss curve.

    The killed one measures held-out pairs and offloads, which the whole one does not: that changes
    no byte on a CPU.
    """
    settings = {"epochs": 5, "warmup_steps": 2, "lr": 1e-4, **settings}
    whole = job(heldout_caches, tmp_path / "whole", **settings)
    expected, weights = run(whole, ranks)
    held = 1  # fewer than ranks: one has none
    monitor = MonitorSettings(heldout_steps=2, heldout_pairs=held)
    watched = {**SAVING, "monitor": monitor, "offload": offload}
    cut = job(heldout_caches, tmp_path / "cut", **settings).model_copy(update=watched)
    killed(cut, ranks, at_step=3)
    checkpoint = newest(cut)
    assert checkpoint.name >= "step-00000002"
    again = cut.model_copy(update={"resume": checkpoint, "output": tmp_path / "again"})
    records, resumed = run(again, ranks)
    assert [r["step"] for r in records] == [r["step"] for r in expected]
    assert [r["loss"] for r in records] == [r["loss"] for r in expected]
    assert [r["lr"] for r in records] == [r["lr"] for r in expected]
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    before, after = (read_heldout(spec) for spec in (cut, again))
    assert [record["step"] for record in after] == list(range(0, 11, 2))
    # Of the killed run's records, those up to its checkpoint were kept; later ones came again.
    assert after[: len(before)] == before
    alone = health_of_the_reference(heldout_caches, held)
    for name, value in {"loss": math.log(2), **alone}.items():
        assert after[0][name] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_offloading_is_deepspeeds(monkeypatch):
    """That DeepSpeed was told: on a CPU the result cannot show it."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    start_distributed()  # once a process
    found = {}
    for stage, offload in ((1, "none"), (1, "optimizer"), (3, "optimizer"), (3, "all")):
        settings = TrainSettings(zero_stage=stage)
        engine = make_engine(make_model(), (), settings, 10, half=False, offload=offload)
        moved = engine.zero_offload_optimizer(), engine.zero_offload_param()
        found[stage, offload] = [part and str(part.device) for part in moved]
    assert found == {
        (1, "none"): [None, None],
        (1, "optimizer"): ["cpu", None],
        (3, "optimizer"): ["cpu", None],
        (3, "all"): ["cpu", "cpu"],
    }
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_stopped_run_saves_its_step_and_goes_on_with_other_ranks(caches, tmp_path):
    """SIGTERM to one of two ranks; one rank goes on, where the sums differ by rounding."""
    settings = {"epochs": 40, "zero_stage": 2, "lr": 1e-6}
    _, weights = run(job(caches, tmp_path / "whole", **settings), 2)
    cut = job(caches, tmp_path / "cut", **settings)
    error = killed(cut, 2, at_step=2, how=signal.SIGTERM)
    assert isinstance(error, Preempted)
    (checkpoint,) = cut.checkpoints.glob("step-*")
    assert f"told to stop, after step {int(checkpoint.name[5:])};" in str(error)
    again = cut.model_copy(update={"resume": checkpoint, "output": tmp_path / "again"})
    records, resumed = run(again, 1)
    assert [record["step"] for record in records] == list(range(1, 81))
    for name, value in weights.items():
        assert (value - resumed[name]).abs().max() < 3e-6, name


def test_a_full_disk_is_said_once_and_ends_training_the_second_time(
    caches, tmp_path, small_disk, caplog
):  # fmt: skip
    """2 MB hold a few checkpoints; the last of them is whole, and a run goes on from it."""
    spec = job(caches, tmp_path / "out", epochs=20)
    full = spec.model_copy(update={**SAVING, "checkpoints": small_disk / "checkpoints"})
    with pytest.raises(FPOError, match=r"rank 0 could not write checkpoint (step-\d+): .*go"):
        run(full, 1)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert "train: rank 0 could not write checkpoint step-" in said[0]
    assert not list(small_disk.rglob("*.partial"))
    checkpoint = newest(full)
    again = spec.model_copy(update={"resume": checkpoint, "output": tmp_path / "again"})
    records, _ = run(again, 1)
    assert [record["step"] for record in records] == list(range(1, 41))


def test_checkpoints_that_do_not_fit_are_refused(caches, tmp_path):
    spec = job(caches, tmp_path / "one").model_copy(update=SAVING)
    run(spec, 1)
    checkpoint = newest(spec)
    again = spec.model_copy(update={"resume": checkpoint, "output": tmp_path / "again"})
    made_from = {"lr": 1.0, "k": 9, "sae": "x"}
    other = again.model_copy(update={"version": "f" * 16, "made_from": made_from})
    differences = "0{16}, this run makes f{16}: k: 8 there, 9 here; sae: nothing there, x here$"
    with pytest.raises(FPOError, match=f"is of the policy {differences}"):
        run(other, 1)
    rmsprop = again.settings.model_copy(update={"optimizer": "rmsprop"})
    with pytest.raises(FPOError, match=r"of another model or optimizer: \d+ tensors differ"):
        run(again.model_copy(update={"settings": rmsprop}), 1)
    cut = tmp_path / "cut" / checkpoint.name
    shutil.copytree(checkpoint, cut)
    state = cut / "state-00000-of-00001.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(FPOError, match=f"{checkpoint.name} is incomplete or damaged"):
        run(again.model_copy(update={"resume": cut}), 1)
    state.unlink()
    assert not is_complete(cut)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_weights_that_are_loaded_are_those_of_the_source(caches, tmp_path, stage):
    """At a rate that moves nothing but zeros, what comes out is what went in, to the last bit."""
    _, weights = train(caches, tmp_path, ranks=1 + stage // 3, zero_stage=stage, lr=1e-36)
    source = load_file(caches / "model" / "model.safetensors")
    assert source.keys() == weights.keys()
    for name, value in source.items():
        assert torch.equal(torch.where(value == 0, 0.0, weights[name]), value), name
        assert weights[name][value == 0].abs().sum() < 1e-30


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_schedules_after_the_warm_up_are_transformers(schedule, theirs):
    settings = TrainSettings(schedule=schedule, warmup_steps=5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    other = theirs(optimizer, 5, 40)
    for step in range(40):
        ours = lr_factor(settings, step, 40)
        if step < 5:
            assert ours == pytest.approx((step + 1) / 6)
        else:
            assert ours == pytest.approx(other.get_last_lr()[0])
        optimizer.step()
        other.step()


def test_the_first_failing_ranks_traceback_is_shown(caches, tmp_path):
    spec = job(caches, tmp_path / "out")
    gone = spec.model_copy(update={"reference": (tmp_path / "gone.parquet",)})
    with pytest.raises(FPOError, match=r"(?s)training failed on rank\d first:.*FileNotFoundError"):
        run(gone, 2)
    for rank in (0, 1):
        assert "gone.parquet" in (tmp_path / "out" / f"train-rank{rank}.log").read_text()
