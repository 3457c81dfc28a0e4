"""Training in real DeepSpeed worker processes, on caches made by the real offline pass."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fpo_core.data.batches import PairIds
from fpo_core.errors import FPOError
from fpo_core.models.load import load_model
from fpo_core.recipe.schema import MonitorSettings
from fpo_core.training.examples import read_examples
from fpo_core.training.feature_shards import FeatureShards
from fpo_core.training.job import TrainingJob
from fpo_core.training.launch import run_workers
from fpo_core.training.saved import check_saved
from tests.fpo_core.workers import (
    LAST,
    PINNED,
    job,
    ranks_of,
    sae,
    train,
    worker_processes,
    write_caches,
)
from tests.tiny import save_model, save_sae


@pytest.mark.parametrize("method", ["fpo", "dpo", "tdpo1", "tdpo2"])
def test_first_step_is_log_2_and_training_lowers_the_loss(caches, tmp_path, method):
    records, _ = train(caches, tmp_path, method=method, epochs=6)
    assert records[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert records[0]["discrepancy_chosen"] < 1e-9
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["accuracy"] == 1.0


def test_objectives_with_a_live_reference_measure_and_hold_its_kl(caches, tmp_path):
    free, _ = train(caches, tmp_path / "free", method="tdpo2", alpha=0.0, epochs=6)
    held, _ = train(caches, tmp_path / "held", method="tdpo2", alpha=8.0, epochs=6)
    for records in (free, held):
        assert records[0]["kl_chosen"] == pytest.approx(0, abs=1e-6)
        assert records[-1]["kl_rejected"] > 0
    assert held[-1]["kl_rejected"] < free[-1]["kl_rejected"]
    parts = held[-1]
    assert parts["difference"] - parts["target_margin"] - parts["constraint"] > 0
    simpo, _ = train(caches, tmp_path / "simpo", method="simpo_kl", epochs=6)
    assert simpo[-1]["loss"] < simpo[0]["loss"]


def test_unpooled_discrepancy_from_the_token_cache(caches, tmp_path):
    records, _ = train(
        caches, tmp_path, saes=(sae(caches, tokens=["tokens"]),), pooled=False, epochs=6
    )
    assert records[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert records[0]["discrepancy_rejected"] < 1e-9
    assert records[-1]["discrepancy_rejected"] > 1e-4
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(record["missing"] == 0 for record in records)


def test_further_saes_add_their_discrepancy(caches, tmp_path):
    """Another place, here after the final norm; held alone, and together with the first."""
    both = (sae(caches), sae(caches, LAST, "last"))
    held = {"alpha": 4.0, "epochs": 4}
    one, two, sum_ = (
        train(caches, tmp_path / name, saes=saes, **held)[0]
        for name, saes in (("one", both[:1]), ("two", both[1:]), ("sum", both))
    )
    assert sum_[0]["discrepancy_chosen"] < 1e-8
    # After one same step the two discrepancies add up; later the runs differ.
    assert one[1]["discrepancy_rejected"] > 0
    assert two[1]["discrepancy_rejected"] > 0
    assert sum_[1]["discrepancy_rejected"] == pytest.approx(
        one[1]["discrepancy_rejected"] + two[1]["discrepancy_rejected"], rel=1e-4
    )


def test_a_group_with_a_weight_stays_nearer_to_the_reference(caches, tmp_path):
    """Two groups are measured; the weight is on one, whose change on the rejected side shrinks."""

    def groups(weight):
        return [
            {"name": "held", "features": [40, 2], "weight": weight},
            {"name": "free", "features": [5], "weight": 0},
        ]

    free, held = (
        train(caches, tmp_path / name, groups=groups(weight), alpha=8.0, epochs=6, lr=5e-4)[0]
        for name, weight in (("free", 0.0), ("held", 3.0))
    )
    assert held[0]["group.held_rejected"] < 1e-10

    def late(records, group):
        return sum(record[f"group.{group}_rejected"] for record in records[-4:])

    assert late(held, "held") < 0.5 * late(free, "held")
    assert late(held, "free") > 0.5 * late(free, "free")


def test_sft_makes_the_chosen_responses_likelier(caches, tmp_path):
    records, _ = train(caches, tmp_path, method="sft", epochs=6)
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["chosen_reward"] > 0


def test_saved_policy_is_an_ordinary_model_and_moved(caches, tmp_path):
    _, weights = train(caches, tmp_path, method="simpo", lr=5e-7)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    before = load_file(caches / "model" / "model.safetensors")
    # float32 masters: even the paper's learning rate moves most parameters.
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights[name] != before[name]).float().mean() > 0.9


def test_a_policy_that_was_not_saved_rightly_is_noticed(caches, tmp_path):
    train(caches, tmp_path)
    check_saved(tmp_path, "sdpa")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.2.mlp.down_proj.weight"
    save_file({**weights, name: 1.01 * weights[name]}, file, metadata={"format": "pt"})
    with pytest.raises(FPOError, match=r"pair p\d the log-prob -.*, the trained one -.* not saved"):
        check_saved(tmp_path, "sdpa")


def test_ranks_and_micro_batches_give_the_same_policy(caches, tmp_path):
    """Global loss normalisation: 2 ranks under ZeRO-2 equal one rank, to float32 rounding."""
    _, one = train(caches, tmp_path / "one", batch_size=3, lr=1e-4)
    # 20 tokens hold one or two pairs: micro-batches, and empty ones on a rank that has fewer.
    two = job(caches, tmp_path / "two", batch_size=3, zero_stage=2, lr=1e-4)
    run_workers(two.model_copy(update={"tokens_per_batch": 20}), 2, [].append)
    two = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name, value in one.items():
        assert (value - two[name]).norm() < 1e-6 * value.norm(), name


@pytest.mark.slow
def test_a_reference_that_is_sharded_gives_the_same_kl(caches, tmp_path):
    """ZeRO-3 deals the live reference to the ranks, too."""
    settings = {"method": "tdpo2", "lr": 1e-4, "epochs": 2}
    whole, _ = train(caches, tmp_path / "whole", **settings)
    dealt, _ = train(caches, tmp_path / "dealt", ranks=2, zero_stage=3, **settings)
    assert whole[-1]["kl_rejected"] > 1e-4
    for one, two in zip(whole, dealt, strict=True):
        for side in ("chosen", "rejected"):
            expected = pytest.approx(one[f"kl_{side}"], rel=1e-3, abs=1e-6)
            assert two[f"kl_{side}"] == expected
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_repeated_run_is_bitwise_the_same_however_it_is_watched(heldout_caches, tmp_path):
    """With figures on held-out pairs and without: same weights, same curve."""
    heldout, weights, curves = [], [], []
    for name, monitor in (("one", None), ("two", MonitorSettings(heldout_steps=3))):
        spec = job(heldout_caches, tmp_path / name, warmup_steps=2)
        spec = spec.model_copy(update={"monitor": monitor})
        records = []
        run_workers(spec, 1, records.append, on_heldout=heldout.append)
        weights.append(load_file(spec.output / "model" / "model.safetensors"))
        curves.append([(record["loss"], record["grad_norm"]) for record in records])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert curves[0] == curves[1]
    assert [record["lr"] for record in records] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert [record["step"] for record in heldout] == [0, 3, 4]  # every third, and the last
    assert heldout[0]["pairs"] == 6


def test_caches_of_another_model_are_refused_before_the_first_step(caches, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("pairs", "reference", "pooled", "tokens"):
        (other / f"{name}.parquet").write_bytes((caches / f"{name}.parquet").read_bytes())
    save_model(other / "model", seed=7)
    save_sae(other / "sae")
    with pytest.raises(FPOError, match=r"`reference`.*nats a token.*`features .*--force"):
        run_workers(job(other, tmp_path / "out"), 1, [].append)


def test_non_finite_loss_stops_names_the_pairs_and_keeps_the_batch(caches, tmp_path):
    with pytest.raises(FPOError, match=r"step 2: the loss is not finite for pair p\d \(nan\)"):
        train(caches, tmp_path, lr=1e30, max_grad_norm=1e30, epochs=4)
    (file,) = tmp_path.glob("bad-batch-step2-rank0.parquet")
    kept = pq.read_table(file).to_pylist()
    assert len(kept) == 8  # a row a response of the batch's four pairs
    pairs = {row["pair_id"]: row for row in pq.read_table(caches / "pairs.parquet").to_pylist()}
    for row in kept:
        assert row["response_ids"] == pairs[row["pair_id"]][f"{row['side']}_ids"]
        assert row["reference_logp"] < 0
        assert math.isnan(row["loss"])


def first(column, value):
    """Change a column of a table's first row."""

    def change(table):
        values = [value, *table[column].to_pylist()[1:]]
        number = table.schema.get_field_index(column)
        return table.set_column(
            number,
            table.schema.field(number),
            pa.array(values, type=table.schema.field(number).type),
        )

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("reference", lambda table: table.take([1, 0, *range(2, 8)]),
         "shard 0, row 0: pairs and reference disagree on the pair: p0 and p1"),
        ("reference", lambda table: table.slice(1), "8 pairs, 7 reference rows"),
        ("reference", first("rejected_tokens", 9),
         "the rejected response of pair p0 has 2 scored tokens, reference was made of 9"),
        ("pooled", first("n_tokens", 7),
         r"chosen response of pair p0 has 3 scored tokens, features \(layer 1 resid_post\) was "
         "made of 7"),
        ("pooled", lambda table: table.slice(2), "8 pairs, 14 rows of features"),
        ("pooled", first("indices", [3, 500]), "names feature 500, the SAE has 0 to 95"),
        ("pooled", lambda table: first("values", [1.0])(first("indices", [3])(table)),
         r"train.k=8, features \(layer 1 resid_post\) stores 1 of \d+ features"),
        ("pooled", lambda table: first("pinned_values", [0.0])(first("pinned", [2])(table)),
         "train.groups hold feature 5, 40, .* has no values of it pinned"),
        ("pooled", lambda table: table.take([1, 0, *range(2, 16)]),
         r"chosen response of pair p0 has 3 scored tokens, features .* was made of 2"),
        ("pooled", first("side", "rejected"), "has the rejected response of pair p0 where the cho"),
        ("tokens", lambda table: table.slice(1), r"\d+ scored tokens, \d+ rows of the token"),
        ("tokens", lambda table: table.take([1, 0, *range(2, len(table))]),
         "token row 0: .* have the position 1 where 0 should be"),
        ("tokens", first("indices", [500]), "name feature 500, the SAE has 0 to 95"),
        ("tokens", lambda table: first("values", [1.0])(first("indices", [3])(table)),
         r"token row 0: train.k=8, .* store 1 of \d+; raise features.tokens_k"),
    ],
)  # fmt: skip
def test_caches_that_disagree_are_named_with_both_values(caches, tmp_path, name, change, message):
    for table in ("pairs", "reference", "pooled", "tokens"):
        found = pq.read_table(caches / f"{table}.parquet")
        pq.write_table(change(found) if table == name else found, tmp_path / f"{table}.parquet")
    one = {table: (tmp_path / f"{table}.parquet",) for table in ("pooled", "tokens")}
    cache = FeatureShards(**one, d_sae=96, pinned=PINNED, label="features (layer 1 resid_post)")
    pairs, reference = ([tmp_path / f"{table}.parquet"] for table in ("pairs", "reference"))
    with pytest.raises(FPOError, match=message):
        read_examples(pairs, reference, [cache], 8, "train")


def test_pinned_values_of_something_else_are_refused(caches, tmp_path):
    table = pq.read_table(caches / "pooled.parquet")
    wrong = pa.array([[9.0] * 3] * len(table), type=table.schema.field("pinned_values").type)
    number = table.schema.get_field_index("pinned_values")
    pq.write_table(table.set_column(number, table.schema.field(number), wrong), tmp_path / "p")
    groups = [{"name": "held", "features": [40]}]
    odd = sae(caches).model_copy(update={"pooled": (tmp_path / "p",)})
    with pytest.raises(FPOError, match=r"`features \(layer 1 resid_post\), train.groups`"):
        train(caches, tmp_path / "out", saes=(odd,), groups=groups)


@pytest.mark.parametrize("pooled", [True, False])
def test_caches_in_bfloat16_start_a_float32_policy(caches, tmp_path, pooled):
    """Rounding switches features on and off, most of all in answers of one to five tokens.

    Weights of this size move a log-prob by 0.19 nats a token, and D to 1.3 % of its features.
    """
    save_model(tmp_path / "model", initializer_range=0.8)
    (tmp_path / "sae").symlink_to(caches / "sae")
    pairs = [PairIds(r["pair_id"], r["prompt_ids"], r["chosen_ids"], r["rejected_ids"])
             for r in pq.read_table(caches / "pairs.parquet").to_pylist()]  # fmt: skip
    model = load_model(tmp_path / "model", dtype="bfloat16", attention="sdpa")
    write_caches(tmp_path, pairs, model)
    one = sae(tmp_path, tokens=["tokens"])
    spec = job(tmp_path, tmp_path / "out", (one,), pooled=pooled, batch_size=8)
    run_workers(spec.model_copy(update={"reference_dtype": "bfloat16"}), 1, [].append)
    with pytest.raises(FPOError, match="float32 explains"):
        run_workers(spec, 1, [].append)


def test_pairs_of_another_tokenizer_are_refused(caches, tmp_path):
    """Ids that the model's vocabulary does not have; others show at the first step's check."""
    for file in caches.glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_model(tmp_path / "model", vocab_size=200)
    save_sae(tmp_path / "sae")
    with pytest.raises(FPOError, match=r"has the token id \d+, the model's vocabulary has 200"):
        run_workers(job(tmp_path, tmp_path / "out"), 1, [].append)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_survives_its_parent(caches, tmp_path, how):
    """Kill the process that started the workers; every process of the group is gone soon."""
    spec = job(caches, tmp_path / "out", epochs=100_000)
    (tmp_path / "out").mkdir()
    spec.save(tmp_path / "spec.json")
    code = (
        "import sys, pathlib; from fpo_core.training.job import TrainingJob;"
        "from fpo_core.training.launch import run_workers;"
        f"run_workers(TrainingJob.load(pathlib.Path({str(tmp_path / 'spec.json')!r})), 2, print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2])  # fmt: skip
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0, 120)
    started = workers_of(tmp_path)
    assert len(started) >= 3  # launcher and two ranks
    parent.send_signal(how)
    parent.wait(30)
    wait_for(lambda: not workers_of(tmp_path), 30)


def test_a_worker_killed_for_memory_is_said_as_such(caches, tmp_path):
    """The kernel's way: SIGKILL to rank 1, whose neighbour fails for it, and says so first."""
    killed = []

    def kill_rank_1(_record):
        if not killed:
            killed.append(ranks_of(tmp_path)[1])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(FPOError, match=r"most likely for memory \(.*\); lower resources"):
        run_workers(job(caches, tmp_path / "out", epochs=100_000), 2, kill_rank_1)


@pytest.mark.slow
def test_ranks_that_hang_go_with_their_launcher(caches, tmp_path, monkeypatch):
    """One rank stands still, the other waits for it: both outlast the grace, none the stage."""
    monkeypatch.setattr("fpo_core.training.launcher.GRACE_SECONDS", 1.0)
    halted = []

    def halt_and_interrupt(_record):
        if not halted:
            halted.append(ranks_of(tmp_path)[1])
            os.kill(halted[0], signal.SIGSTOP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_workers(job(caches, tmp_path / "out", epochs=100_000), 2, halt_and_interrupt)
    os.kill(halted[0], signal.SIGCONT)
    wait_for(lambda: not workers_of(tmp_path), 10)


def workers_of(folder: Path) -> list[str]:
    return [line for _, line in worker_processes(folder)]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def test_job_file_round_trips(caches, tmp_path):
    spec = job(caches, tmp_path)
    spec.save(tmp_path / "job.json")
    assert TrainingJob.load(tmp_path / "job.json") == spec
    assert json.loads((tmp_path / "job.json").read_text())["settings"]["method"] == "fpo"
