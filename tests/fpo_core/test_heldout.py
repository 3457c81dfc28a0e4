"""Figures on held-out pairs during training, against a computation of each response by itself."""

import functools
import gc
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fpo_core.models.forward import reference_side
from fpo_core.models.load import load_model
from fpo_core.recipe.schema import MonitorSettings
from fpo_core.sae.coder import AttachedSae, load_coder
from fpo_core.sae.health import Health, sae_health, usual_range
from fpo_core.training import heldout
from fpo_core.training.engine import Policy
from fpo_core.training.examples import read_examples
from fpo_core.training.feature_shards import FeatureShards
from fpo_core.training.heldout import HeldoutMonitor, heldout_line
from fpo_core.training.launch import _Tail, _tell_of_records
from fpo_core.training.loss import PairLoss
from tests.fpo_core.workers import FIRST, job, sae
from tests.tiny import SAE_LAYER

K, BETA, ALPHA = 8, 0.1, 0.5


@pytest.fixture(autouse=True)
def process_group(tmp_path_factory):
    meeting = tmp_path_factory.mktemp("group") / "point"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_records_are_told_by_step_a_steps_own_first(tmp_path):
    """Of the two files, whichever is read first, and a line that is being written not yet."""
    steps, held = tmp_path / "metrics.jsonl", tmp_path / "heldout.jsonl"
    told = []
    tails = {path.name: _Tail(path) for path in (steps, held)}
    tell = {
        "metrics.jsonl": lambda record: told.append(("step", record["step"])),
        "heldout.jsonl": lambda record: told.append(("held-out", record["step"])),
    }
    held.write_text('{"step": 0}\n{"step": 2}\n')
    steps.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step"')
    _tell_of_records(tails, tell)
    assert told == [("held-out", 0), ("step", 1), ("step", 2), ("held-out", 2), ("step", 3)]
    with steps.open("a") as log:
        log.write(": 4}\n")
    _tell_of_records(tails, tell)
    assert told[5:] == [("step", 4)]


@pytest.fixture
def policy(heldout_caches):
    """The reference model, a little off its weights."""
    model = load_model(heldout_caches / "model", dtype="float32", attention="sdpa")
    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return model


def examples_of(root, spec, count):
    caches = [FeatureShards(one.pooled, (), 96, (), one.label) for one in spec.saes]
    return read_examples(spec.pairs, spec.reference, caches, K, "heldout")[:count]


def monitor(root, output, *, saes=None, live=None, count=6, every=2, resume=None, **settings):
    """A monitor of one rank, whose batches hold up to two pairs."""
    output.mkdir(parents=True, exist_ok=True)
    spec = job(root, output, **settings).model_copy(
        update={
            "monitor": MonitorSettings(heldout_steps=every, heldout_pairs=count),
            "resume": resume,
            **({} if saes is None else {"saes": saes}),
        }
    )
    attached = [AttachedSae(load_coder(one.folder), one.hookpoint) for one in spec.saes]
    loss = PairLoss(spec.settings, attached, live)

    def in_twos(mine):
        return [list(range(len(mine)))[start : start + 2] for start in range(0, len(mine), 2)]

    return HeldoutMonitor(spec, loss, examples_of(root, spec, count), in_twos, "cpu")


def engine(model, saes=True):
    """What a monitor uses of an engine."""
    return SimpleNamespace(module=Policy(model, (FIRST,) if saes else ()))


def records(folder):
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]


def warnings(folder):
    file = folder / "warnings.log"
    return file.read_text().splitlines() if file.is_file() else []


def response_figures(models, coder, prompt, response):
    """Log-probs [2], KL, pooled features [2, F], the policy's activations, in float64."""
    ids, places = (
        torch.tensor([[*prompt, *response]]),
        torch.arange(len(response)) + len(prompt) - 1,
    )
    logps, pooled, layers = [], [], []
    for model in models:
        out = model(input_ids=ids, output_hidden_states=True)
        logps.append(torch.log_softmax(out.logits[0, places], -1))
        x = out.hidden_states[SAE_LAYER + 1][0, places]
        before = (x - coder["b_dec"]) @ coder["W_enc"] + coder["b_enc"]
        acts = torch.where(before > coder["threshold"].clamp_min(0), before, 0.0)
        pooled.append(acts.mean(0))
        layers.append((x, acts))
    policy, reference = logps
    picked = [lp.gather(1, torch.tensor(response)[:, None]).sum() for lp in logps]
    return (
        picked,
        (reference.exp() * (reference - policy)).sum(),
        pooled,
        *layers[0],
    )


def discrepancy(policy, reference):
    def top(values):
        return set(values.topk(K).indices[values.topk(K).values > 0].tolist())

    chosen = sorted(top(policy) | top(reference))
    return (policy[chosen] - reference[chosen]).square().sum() / K


def test_the_figures_are_those_of_each_response_by_itself(heldout_caches, policy, tmp_path):
    """Loss, accuracy, margin, D, KL, FVU and L0 in float64, from whole logits."""
    watch = monitor(heldout_caches, tmp_path)
    watch.after_step(engine(policy), 4, last=False)
    (found,) = records(tmp_path)
    reference = load_model(heldout_caches / "model", dtype="float64", attention="eager")
    models = (policy.double(), reference)
    coder = {
        name: value.double()
        for name, value in load_file(heldout_caches / "sae" / "sae_weights.safetensors").items()
    }
    wanted, xs, all_acts = [], [], []
    for example in watch.examples:
        scores, sides = [], {}
        for side in ("chosen", "rejected"):
            response = getattr(example.ids, side)
            logps, kl, pooled, x, acts = response_figures(
                models, coder, example.ids.prompt, response
            )
            d = discrepancy(*pooled)
            scores.append(((logps[0] - logps[1]) / len(response), d))
            sides |= {f"kl_{side}": kl, f"discrepancy_{side}": d}
            xs.append(x)
            all_acts.append(acts)
        margin = BETA * (scores[0][0] - scores[1][0])
        constraint = ALPHA * BETA * (scores[1][1] - scores[0][1])
        wanted.append(
            {
                "loss": -torch.nn.functional.logsigmoid(margin - constraint),
                "accuracy": (margin > 0).double(), "margin": margin, **sides,
            }
        )  # fmt: skip
    for name in wanted[0]:
        mean = float(torch.stack([pair[name] for pair in wanted]).mean())
        assert found[name] == pytest.approx(mean, rel=2e-4), name
    x, acts = torch.cat(xs), torch.cat(all_acts)
    error = (x - acts @ coder["W_dec"] - coder["b_dec"]).square().sum()
    fvu = float(error / (x - x.mean(0)).square().sum())
    assert found["fvu.1-resid_post"] == pytest.approx(fvu, rel=1e-4)
    assert found["l0.1-resid_post"] == pytest.approx(float((acts > 0).sum(1).double().mean()))
    line = heldout_line(found)
    assert line.startswith("held-out after step 4: loss ")
    assert f"FVU {fvu:.4g}, L0 " in line
    assert all(weight.grad is None for weight in policy.parameters())


def test_the_range_is_of_the_pairs_and_leaves_room():
    values = torch.linspace(1, 3, 41, dtype=torch.float64)
    low, high = usual_range(Health(2.0, values))
    assert (low, high) == pytest.approx(tuple(np.percentile(values.numpy(), [5, 95])))
    assert usual_range(Health(32.0, torch.full((9,), 32.0).double())) == pytest.approx((28.8, 35.2))
    # One odd pair is most of the whole: its figure is in the range all the same.
    low, high = usual_range(Health(8.0, torch.tensor([1.0] * 40 + [90.0]).double()))
    assert low == 1.0
    assert high == pytest.approx(8.8)


def test_a_pairs_fvu_is_against_the_mean_of_all():
    """A pair of one token that is all alike has no variance of its own."""
    #                    tokens, active, error, squares, x
    sums = torch.tensor([[2.0, 6.0, 1.0, 8.0, 4.0], [2.0, 2.0, 3.0, 0.0, 0.0]], dtype=torch.float64)
    health = sae_health(sums)
    assert health["fvu"].value == pytest.approx(4.0 / 4.0)
    assert health["fvu"].by_pair.tolist() == pytest.approx([0.5, 1.5])
    assert health["l0"].value == 2.0
    assert health["l0"].by_pair.tolist() == [3.0, 1.0]


def test_an_alarm_each_time_that_a_quantity_leaves_its_range(heldout_caches, tmp_path):
    model = load_model(heldout_caches / "model", dtype="float32", attention="sdpa")
    watch, run = monitor(heldout_caches, tmp_path), engine(model)
    written = ("embed_tokens", "o_proj", "down_proj")  # all that adds to the residual stream
    home = {
        weight: weight.clone()
        for name, weight in model.named_parameters()
        if any(part in name for part in written)
    }
    for step, scale in enumerate((1, 0.02, 0.1, 1, 0.02)):
        for weight, value in home.items():
            weight.copy_(scale * value)
        watch.after_step(run, 2 * step, last=False)
    found = records(tmp_path)
    outside = {
        quantity: [record[f"{quantity}_outside.1-resid_post"] for record in found]
        for quantity in ("fvu", "l0")
    }
    assert outside["fvu"] == [False, True, False, False, True]
    assert outside["l0"] == [False, True, True, False, True]  # stays outside: told once
    assert len({record["fvu_low.1-resid_post"] for record in found}) == 1
    told = [line.partition(" is ")[0] for line in warnings(tmp_path)]
    assert told == [
        f"after step {step} the {quantity} of the SAE at layer 1 resid_post"
        for step in (2, 8) for quantity in ("FVU", "L0")
    ]  # fmt: skip
    low, high = (found[0][f"fvu_{end}.1-resid_post"] for end in ("low", "high"))
    assert f"outside of {low:.4g} to {high:.4g}, its range before training" in warnings(tmp_path)[0]
    assert found[0]["kl_chosen"] == pytest.approx(0, abs=1e-6)
    assert found[1]["kl_chosen"] > 0.1


def test_a_resumed_run_goes_on_from_its_records(heldout_caches, policy, tmp_path):
    first = monitor(heldout_caches, tmp_path / "one")
    model = load_model(heldout_caches / "model", dtype="float32", attention="sdpa")
    first.after_step(engine(model), 0, last=False)
    first.after_step(engine(policy), 2, last=False)
    again = monitor(heldout_caches, tmp_path / "two", resume=tmp_path / "one")
    again.after_step(engine(policy), 2, last=False)  # has it already
    again.after_step(engine(policy), 3, last=False)  # not due
    again.after_step(engine(policy), 5, last=True)
    (found,) = records(tmp_path / "two")
    earlier = records(tmp_path / "one")
    assert found == {**earlier[1], "step": 5}
    assert found["l0_high.1-resid_post"] == earlier[0]["l0_high.1-resid_post"]
    assert warnings(tmp_path / "two") == []


@pytest.mark.parametrize("other", [{"count": 4}, {"resume": None}])
def test_without_a_range_of_the_same_pairs_there_is_no_alarm(
    heldout_caches, policy, tmp_path, other
):
    model = load_model(heldout_caches / "model", dtype="float32", attention="sdpa")
    monitor(heldout_caches, tmp_path / "one").after_step(engine(model), 0, last=False)
    again = monitor(heldout_caches, tmp_path / "two", **{"resume": tmp_path / "one", **other})
    for step in (2, 4):
        again.after_step(engine(policy), step, last=False)
    assert [r["fvu_outside.1-resid_post"] for r in records(tmp_path / "two")] == [None, None]
    (told,) = warnings(tmp_path / "two")
    assert "no range to stay in" in told


def test_who_is_told_to_stop_gives_a_measurement_up_but_not_the_first(
    heldout_caches, policy, tmp_path
):  # fmt: skip
    watch = monitor(heldout_caches, tmp_path)
    asked = []

    def stop():
        asked.append(True)
        return len(asked) > 1  # in mid-measurement

    watch.after_step(engine(policy), 0, last=False, stop=stop)
    watch.after_step(engine(policy), 2, last=False, stop=stop)
    assert [record["step"] for record in records(tmp_path)] == [0]
    assert len(asked) == 2
    watch.after_step(engine(policy), 2, last=False)
    assert [record["step"] for record in records(tmp_path)] == [0, 2]
    watch.after_step(engine(policy), 3, last=True, stop=stop)  # nothing is left to stop
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 3]


def test_the_reference_is_in_memory_for_the_measurement_only(heldout_caches, policy, tmp_path):
    watch = monitor(heldout_caches, tmp_path)
    gc.collect()
    watch.after_step(engine(policy), 0, last=False)
    models = [one for one in gc.get_objects() if isinstance(one, LlamaForCausalLM)]
    assert all(one is policy for one in models)


@pytest.mark.parametrize(
    ("method", "saes", "live"),
    [("tdpo2", True, True), ("dpo", False, False), ("sft", True, False), ("sft", False, False)],
)
def test_every_objective_is_measured(
    heldout_caches, policy, tmp_path, monkeypatch, method, saes, live
):
    """A live reference is used and no other loaded; where there is no SAE, there is no FVU."""
    reference = load_model(heldout_caches / "model", dtype="float32", attention="sdpa")
    if live:
        monkeypatch.setattr(heldout, "load_model", None)
    watch = monitor(
        heldout_caches, tmp_path, method=method, saes=(sae(heldout_caches),) if saes else (),
        live=functools.partial(reference_side, reference) if live else None,
    )  # fmt: skip
    watch.after_step(engine(policy, saes), 0, last=False)
    (found,) = records(tmp_path)
    assert found["kl_rejected"] > 0
    assert ("fvu.1-resid_post" in found) == saes
    assert ("FVU" in heldout_line(found)) == saes
    assert warnings(tmp_path) == []
