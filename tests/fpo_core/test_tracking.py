"""Figures on their way to TensorBoard and to Weights & Biases, read back with their own readers."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpo_core import tracking
from fpo_core.tracking import TensorBoard, check_wandb, wandb_run

ROOT = Path(__file__).parents[2]
STEPS = [
    {"step": step, "steps": 3, "loss": 1 / step, "grad_norm": None if step == 2 else 0.5}
    for step in (1, 2, 3)
]
HELDOUT = {"step": 2, "pairs": 4, "fvu.1-resid_post": 0.25, "fvu_outside.1-resid_post": True}


def events(folder) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def test_tensorboard_reads_every_figure_at_its_step(tmp_path):
    writer = TensorBoard(tmp_path)
    for record in STEPS:
        writer.log("train", record)
    writer.log("heldout", HELDOUT)
    writer.close()
    assert events(tmp_path) == {
        "train/loss": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))],
        "train/grad_norm": [(1, 0.5), (3, 0.5)],
        "heldout/pairs": [(2, 4.0)],
        "heldout/fvu.1-resid_post": [(2, 0.25)],
        "heldout/fvu_outside.1-resid_post": [(2, 1.0)],
    }


def test_tensorboard_can_follow_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.1)
    writer = TensorBoard(tmp_path)
    writer.log("train", STEPS[0])
    deadline = time.monotonic() + 20
    while not events(tmp_path).get("train/loss"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        writer.log("heldout", HELDOUT)  # what comes next takes the rest with it
    writer.close()


def offline_records(folder):
    """The records of an offline run's file: leveldb's log format after a header of 7 bytes.

    Blocks of 32 KiB; each piece has a checksum of 4 bytes, its length in 2 and its type in 1: a
    whole record, or the first, a middle or the last piece of one.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, pieces, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if place + 7 + length > len(data):  # is being written
            break
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(Record())
            found[-1].ParseFromString(pieces)
            pieces = b""
    return found


def history(records):
    return [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_wandb_gets_the_figures_and_settings_and_no_facts_about_the_machine(wandb_offline):
    with wandb_run("mine", "tiny-fpo", "0123456789abcdef", {"lr": 1e-3}) as run:
        assert run is not None
        for record in STEPS[:2]:
            run.log("train", record)
        run.log("heldout", HELDOUT)
        run.log("train", STEPS[0])  # again, as after a resume
        run.log("train", STEPS[2])
    deadline = time.monotonic() + 20
    records = offline_records(wandb_offline)
    while not records or records[-1].WhichOneof("record_type") != "exit":  # W&B's own process
        assert time.monotonic() < deadline
        time.sleep(0.1)
        records = offline_records(wandb_offline)
    assert [(row["_step"], row["train/loss"]) for row in history(records)] == [
        (record["step"], record["loss"]) for record in STEPS
    ]
    assert history(records)[1]["heldout/fvu.1-resid_post"] == 0.25
    (about,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (about.project, about.display_name, about.run_id) == (
        "mine", "tiny-fpo", "0123456789abcdef",
    )  # fmt: skip
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert config["lr"] == 1e-3
    assert not about.host
    kept = b"".join(path.read_bytes() for path in wandb_offline.rglob("*.wandb"))
    assert str(wandb_offline).encode() not in kept
    assert len(socket.gethostname()) < 4 or socket.gethostname().encode() not in kept
    assert not list(wandb_offline.rglob("requirements.txt"))
    assert not list(wandb_offline.rglob("wandb-metadata.json"))


def test_nothing_is_begun_where_no_project_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with wandb_run(None, "tiny-fpo", "0123456789abcdef", {}) as run:
        assert run is None
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_key_says_what_to_do(tmp_path):
    """A key is read from the environment or `wandb login`'s file, of which there is none."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    code = "from fpo_core.tracking import WandbRun; WandbRun('mine', 'tiny-fpo', '0' * 16, {})"
    failed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**env, "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert "FPOError: monitor.wandb=mine: Weights & Biases does not take the run" in failed.stderr
    assert "Set WANDB_API_KEY, or WANDB_MODE=offline to send it later" in failed.stderr


def test_a_missing_wandb_is_refused_with_the_command_that_installs_it():
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "from fpo_core.tracking import check_wandb\n"
        "check_wandb(None)\n"
        "check_wandb('mine')"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "FPOError: monitor.wandb=mine needs the package wandb" in failed.stderr
    assert "pip install 'fpo-pipeline[wandb]'" in failed.stderr
    check_wandb("mine")
