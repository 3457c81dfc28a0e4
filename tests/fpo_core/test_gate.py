"""The gate: figures against plain float64 sums, and what it says of SAEs in and out of place."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fpo_core.hookpoint import Hookpoint
from fpo_core.models.hooks import hooked_module
from fpo_core.sae import gate
from fpo_core.sae.coder import SparseCoder, load_coder
from fpo_core.sae.quality import Fit, Losses, measure_sae
from storage.manifest import json_bytes
from tests.tiny import D_SAE, HIDDEN, LAYERS, fit_sae, make_model, save_sae

SHIPPED = Path(__file__).parents[2] / "recipes" / "data" / "smollm2-135m-sae"
MIDDLE = Hookpoint(1)


def token_rows(lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, 400, (n,), generator=generator).tolist() for n in lengths]


ROWS = token_rows([40, 7, 23, 40, 2, 31] * 6)


def plain_pass(model, row, edit=None, place=MIDDLE):
    """One row by itself: activations everywhere, and each token's loss, by transformers' own."""
    seen = {}

    def hook(_module, _inputs, output):
        value = output[0] if isinstance(output, tuple) else output
        seen[place] = value[0].detach()
        if edit is None:
            return None
        value = edit(value.clone())
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = hooked_module(model, place).register_forward_hook(hook)
    with torch.no_grad():
        out = model(torch.tensor([row]), output_hidden_states=True)
    handle.remove()
    logps = out.logits[0, :-1].double().log_softmax(-1)
    losses = -logps.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    return seen[place], out.hidden_states, losses


def fitted_sae(activations, folder) -> SparseCoder:
    """An SAE whose decoder fits its features to the activations."""
    fit_sae(save_sae(folder), activations)
    return load_coder(folder)


class Tiny(NamedTuple):
    model: object
    coder: SparseCoder
    fit: Fit
    beside: list


def measured(model, coder, place, rows=ROWS, **options) -> Fit:
    return measure_sae(
        model, coder, place, rows, beside=gate.other_places(model, place), sample=10**6, **options
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model = make_model()
    read = torch.cat([plain_pass(model, row)[0][1:] for row in ROWS])
    coder = fitted_sae(read, tmp_path_factory.mktemp("sae"))
    return Tiny(model, coder, measured(model, coder, MIDDLE), gate.other_places(model, MIDDLE))


def plain_figures(coder, x) -> tuple[float, float, float]:
    """FVU, L0 and dead fraction by numpy, in float64."""
    values = [t.double().numpy() for t in (x, coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec)]
    x, w_enc, b_enc, w_dec, b_dec = values
    acts = (x - b_dec) @ w_enc + b_enc
    acts = np.where(acts > coder.threshold.numpy(), np.maximum(acts, 0), 0)
    unexplained = ((x - acts @ w_dec - b_dec) ** 2).sum()
    fired = acts > 0
    share = unexplained / ((x - x.mean(0)) ** 2).sum()
    return share, fired.sum(1).mean(), 1 - fired.any(0).mean()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("place", [MIDDLE, Hookpoint(1, "mlp_out")])
def test_the_figures_are_those_of_rows_by_themselves(kind, place, tmp_path):
    """Padding, batches and the attention sink change nothing; losses by a plain edited pass."""
    model = make_model(kind)
    rows = ROWS[:6]
    read = torch.cat([plain_pass(model, row, place=place)[0][1:] for row in rows])
    coder = fitted_sae(read, tmp_path)
    coder.threshold[:3] = 1e9  # never fire
    fit = measured(model, coder, place, rows, tokens_per_batch=90)
    expected = plain_figures(coder, read)
    assert (fit.fvu, fit.l0, fit.dead_fraction) == pytest.approx(expected, rel=1e-4)
    assert fit.dead_fraction >= 3 / D_SAE
    assert fit.tokens == sum(len(row) - 1 for row in rows)

    def spliced(value):
        value[0, 1:] = coder.decode(coder.encode(value[0, 1:]))
        return value

    def ablated(value):
        value[0, 1:] = 0
        return value

    for name, edit in (("original", None), ("spliced", spliced), ("ablated", ablated)):
        losses = torch.cat([plain_pass(model, row, edit, place)[2] for row in rows])
        assert getattr(fit.losses, name) == pytest.approx(float(losses.mean()), rel=1e-5), name
    assert fit.losses.original != pytest.approx(fit.losses.spliced, rel=1e-6)


def test_the_other_places_are_each_layer_the_near_mlps_and_the_final_norm(tiny):
    assert tiny.beside == [
        Hookpoint(0), Hookpoint(2), *(Hookpoint(n, "mlp_out") for n in range(LAYERS)),
        Hookpoint(2, "final_norm"),
    ]  # fmt: skip
    states = [plain_pass(tiny.model, row)[1] for row in ROWS]
    for place, index in ((Hookpoint(0), 1), (Hookpoint(2, "final_norm"), -1)):
        x = torch.cat([state[index][0, 1:] for state in states])
        assert tiny.fit.sample[place] == pytest.approx(plain_figures(tiny.coder, x)[0], rel=1e-4)
    assert tiny.fit.sample[MIDDLE] == pytest.approx(tiny.fit.fvu, rel=1e-4)
    at_end = gate.other_places(tiny.model, Hookpoint(0, "final_norm"))
    assert {place.site for place in at_end} == {"resid_post", "mlp_out"}


def test_a_sample_is_every_nth_token(tiny):
    rows = token_rows([65] * 10)
    fit = measure_sae(tiny.model, tiny.coder, MIDDLE, rows, sample=80, tokens_per_batch=10**4)
    every = torch.cat([plain_pass(tiny.model, row)[0][1:] for row in rows])
    assert fit.sample == {MIDDLE: pytest.approx(plain_figures(tiny.coder, every[::8])[0], rel=1e-4)}
    assert fit.fvu == pytest.approx(plain_figures(tiny.coder, every)[0], rel=1e-4)


def test_only_the_first_rows_are_spliced(tiny):
    few = measured(tiny.model, tiny.coder, MIDDLE, spliced=3)
    alone = measured(tiny.model, tiny.coder, MIDDLE, rows=ROWS[:3])
    assert few.losses == pytest.approx(alone.losses)
    assert few.fvu == pytest.approx(tiny.fit.fvu)


def test_sinks_after_the_first_position_do_not_count(tiny):
    """One token whose activation outweighs all others, by its embedding."""
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[399] = 1e4
    rows = [[token for token in row if token != 399] + [399] for row in ROWS]
    with_sinks = measured(model, tiny.coder, MIDDLE, rows)
    plain = measured(model, tiny.coder, MIDDLE, [row[:-1] for row in rows if len(row) > 2])
    assert with_sinks.fvu == pytest.approx(plain.fvu, rel=0.02)


def test_an_sae_in_its_place_fits(tiny):
    assert tiny.fit.fvu < 0.3
    # How much of the cross-entropy of a random model is recovered says nothing.
    fit = tiny.fit._replace(losses=Losses(2.0, 2.1, 8.0))
    assert gate.judge(fit, MIDDLE, gate.Declared(l0=fit.l0, fvu=fit.fvu)) == ("", ())


@pytest.mark.parametrize(
    "asked", [Hookpoint(2), Hookpoint(1, "mlp_out"), Hookpoint(2, "final_norm")]
)
def test_an_sae_of_another_place_is_told_its_own(tiny, asked):
    fit = measured(tiny.model, tiny.coder, asked)
    cause = gate.judge(fit, asked, gate.Declared(), "sae.also[0]").cause
    changes = [f"sae.also[0].layer to {MIDDLE.layer}"] * (asked.layer != 1)
    changes += ["sae.also[0].site to resid_post"] * (asked.site != "resid_post")
    assert f"it explains {MIDDLE} far better (FVU {tiny.fit.fvu:.2f}) than {asked} (" in cause
    assert cause.endswith(f": set {' and '.join(changes)}")


def test_another_models_sae_fits_nowhere(tiny):
    other = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.manual_seed(1)))[0]
    coder = tiny.coder._replace(W_enc=other @ tiny.coder.W_enc)
    cause = gate.judge(measured(tiny.model, coder, MIDDLE), MIDDLE, gate.Declared()).cause
    assert "it fits no place of this model" in cause
    assert "it is of another model or revision" in cause


def test_an_sae_of_normalised_activations_is_told_the_factor(tiny):
    scale = tiny.fit.scale
    coder = tiny.coder._replace(
        W_enc=tiny.coder.W_enc / scale, W_dec=tiny.coder.W_dec * scale,
        b_dec=tiny.coder.b_dec * scale,
    )  # fmt: skip
    fit = measured(tiny.model, coder, MIDDLE)
    read = torch.cat([plain_pass(tiny.model, row)[0][1:] for row in ROWS])
    assert scale == pytest.approx(HIDDEN**0.5 / float(read.norm(dim=1).mean()), rel=1e-5)
    assert fit.scaled_fvu == pytest.approx(tiny.fit.fvu, rel=1e-3)
    fit = fit._replace(fvu=2.0, sample=dict.fromkeys(fit.sample, 2.0))
    cause = gate.judge(fit, MIDDLE, gate.Declared()).cause
    assert f"trained on normalised activations. Times {scale:.4g}" in cause


def fit_of(asked=0.2, best=0.4, l0=10.0, losses=(2.0, 2.1, 8.0)) -> Fit:
    sample = {MIDDLE: asked, Hookpoint(0): best, Hookpoint(2): 5.0}
    return Fit(500, asked, l0, 0.1, Losses(*losses), sample, 0.5, 9.0)


@pytest.mark.parametrize(
    ("asked", "best", "fits"),
    [
        (0.2, 0.4, True),
        (0.79, 0.7, True),  # bad and yet best here, or nearly so
        (0.4, 0.33, True),
        (0.4, 0.31, False),
        (0.81, 3.0, False),
        (0.81, 0.79, False),
        (0.9, 0.85, False),
        (math.nan, 0.2, False),
        (math.nan, math.nan, False),
        (math.inf, math.inf, False),
        (0.2, math.nan, True),
    ],
)
def test_the_bounds(asked, best, fits):
    fit = fit_of(asked, best)
    verdict = gate.judge(fit, MIDDLE, gate.Declared())
    assert (not verdict.cause) == fits
    record = gate.gate_record(fit, MIDDLE, gate.Declared(), verdict)
    assert json.loads(json.dumps(record, allow_nan=False))["fits"] == fits


def test_what_is_unusual_is_told_and_never_refused():
    def warnings(fit, **declared):
        cause, told = gate.judge(fit, MIDDLE, gate.Declared(**declared))
        assert not cause
        return told

    assert warnings(fit_of(l0=10), l0=19.0) == warnings(fit_of(l0=10), l0=5.1) == ()
    assert warnings(fit_of(l0=10), l0=21.0) == ("L0 is 10.0, it declares 21.0",)
    assert warnings(fit_of(l0=10), l0=4.0) == ("L0 is 10.0, it declares 4.0",)
    assert warnings(fit_of(asked=0.3), fvu=0.16) == ()
    assert warnings(fit_of(asked=0.3), fvu=0.14) == ("FVU is 0.30, it declares 0.14",)
    assert warnings(fit_of(losses=(2.0, 6.0, 8.0))) == (
        "33 % of the cross-entropy is recovered, no more",
    )
    assert warnings(fit_of(losses=(2.0, 6.0, 2.001))) == ()  # ablation costs nothing: no share


def test_what_it_declares_comes_from_its_path_or_its_files(tmp_path):
    assert gate.declared_quality(SHIPPED) == pytest.approx((47.735, 0.1516), abs=1e-3)
    scope = tmp_path / "layer_3" / "width_16k" / "average_l0_71"
    scope.mkdir(parents=True)
    np.savez(scope / "params.npz", W_enc=np.zeros(2))
    for place in (scope, scope / "params.npz"):
        assert gate.declared_quality(place) == (71.0, None)
    fetched = tmp_path / "rel--layer_3__width_16k__average_l0_82"
    fetched.mkdir()
    (fetched / "cfg.json").write_text("{}")
    assert gate.declared_quality(fetched) == (82.0, None)
    (fetched / "cfg.json").write_text('{"metadata": {"l0": 44.0}}')
    (fetched / "quality.json").write_text("cut short {")
    assert gate.declared_quality(fetched) == (44.0, None)
    for no_report in ("[1]", '{"l0": "many", "explained_variance": NaN}'):
        (fetched / "quality.json").write_text(no_report)
        assert gate.declared_quality(fetched) == (44.0, None)


@pytest.mark.parametrize("losses", [(2.0, math.nan, 8.0), (2.0, 2.1, math.inf)])
def test_a_loss_that_is_not_finite_leaves_a_record(losses):
    fit, declared = fit_of(losses=losses), gate.Declared(l0=math.nan, fvu=math.inf)
    verdict = gate.judge(fit, MIDDLE, declared)
    assert not verdict.cause
    assert "%" not in str(verdict.warnings)
    record = json.loads(json_bytes(gate.gate_record(fit, MIDDLE, declared, verdict)))
    assert record["ce_recovered"] is None
    assert record["declared"] == {"l0": None, "fvu": None}


def test_activations_that_are_all_zero_are_refused(tiny):
    model = make_model()
    model.model.layers[MIDDLE.layer].register_forward_hook(lambda *call: torch.zeros_like(call[2]))
    fit = measured(model, tiny.coder, MIDDLE)
    assert f"than {MIDDLE} (inf)" in gate.judge(fit, MIDDLE, gate.Declared()).cause


def test_rows_are_the_first_ones_and_none_is_long():
    every = itertools.repeat(list(range(2000)))
    assert [len(row) for row in gate.sample_rows(every, 1100)] == [512, 512, 512]
    assert gate.sample_rows([[1, 2], [3, 4]], 1000) == [[1, 2], [3, 4]]
    assert gate.spliced_rows([list(range(300))] * 9) == 2


@pytest.fixture(scope="module")
def quickstart() -> Fit:
    """The shipped SAE on its own model, measured once."""
    from fpo_core.data.conversations.reader import read_source
    from fpo_core.data.render import ChatFormat
    from fpo_core.models.load import load_model, load_tokenizer, model_folder, prepare_cpu
    from fpo_core.recipe import load_recipe

    recipe = load_recipe("quickstart")
    prepare_cpu(1)
    folder = model_folder(recipe.model.source)
    chat = ChatFormat(load_tokenizer(folder), "model")
    pairs = itertools.islice(read_source(recipe.data.heldout_sources[0].path), 8)
    rows = chat.ids([chat.render([*pair.prompt, *pair.chosen]) for pair in pairs])
    model = load_model(folder, dtype="float32", attention="sdpa")
    place = recipe.sae.hookpoint
    return measure_sae(
        model, load_coder(SHIPPED), place, rows,
        spliced=3, beside=gate.other_places(model, place), sample=300,
    )  # fmt: skip


@pytest.mark.slow
def test_the_shipped_sae_fits_where_it_is(quickstart):
    assert gate.judge(quickstart, Hookpoint(20), gate.declared_quality(SHIPPED)) == ("", ())
    assert quickstart.fvu == pytest.approx(0.142, abs=0.04)
    assert quickstart.l0 == pytest.approx(40, rel=0.2)
    assert quickstart.losses.recovered > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "fvu"),
    [
        (Hookpoint(18), 0.44),
        (Hookpoint(19), 0.33),
        (Hookpoint(21), 0.27),
        (Hookpoint(22), 0.43),
        (Hookpoint(20, "mlp_out"), 3.8),
        (Hookpoint(29, "final_norm"), 8.0),
    ],
)
def test_everywhere_else_it_is_refused_with_its_own_place(quickstart, asked, fvu):
    assert quickstart.sample[asked] == pytest.approx(fvu, rel=0.25)
    there = quickstart._replace(fvu=quickstart.sample[asked])
    cause = gate.judge(there, asked, gate.Declared()).cause
    assert "it explains layer 20 resid_post far better (FVU 0.1" in cause
