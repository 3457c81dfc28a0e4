"""SAEs: our encoder against sae-lens' own, what is refused, the shipped one, and training one."""

import json
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fpo_core.errors import FPOError
from fpo_core.sae.coder import load_coder
from fpo_core.sae.collect import Activations
from fpo_core.sae.source import sae_folder
from tests.tiny import D_SAE, HIDDEN, save_sae

SHIPPED = Path(__file__).parents[2] / "recipes" / "data" / "smollm2-135m-sae"


def sae_lens_load(folder: Path):
    from sae_lens import SAE

    return SAE.load_from_disk(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "topk", "gated"])
@pytest.mark.parametrize("centred", [True, False])
def test_encode_and_decode_equal_sae_lens(tmp_path, architecture, centred):
    folder = save_sae(tmp_path, architecture=architecture, apply_b_dec_to_input=centred, k=7)
    refit(folder, architecture)
    ours, theirs = load_coder(folder), sae_lens_load(folder)
    x = 3 * torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        acts = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), acts)
        torch.testing.assert_close(ours.decode(acts), theirs.decode(acts))
    columns = torch.tensor([5, 0, D_SAE - 1])
    torch.testing.assert_close(ours.encode_columns(x, columns), ours.encode(x)[:, columns])
    assert (acts > 0).any()
    if architecture == "topk":
        assert (acts > 0).sum(1).max() <= 7


def refit(folder: Path, architecture: str) -> None:
    """Give the tiny SAE the weights that a gated one has."""
    from safetensors.torch import load_file, save_file

    if architecture != "gated":
        return
    weights = load_file(folder / "sae_weights.safetensors")
    generator = torch.Generator().manual_seed(4)
    for name in ("b_gate", "b_mag", "r_mag"):
        weights[name] = 0.2 * torch.randn(D_SAE, generator=generator)
    del weights["b_enc"]
    save_file(weights, folder / "sae_weights.safetensors")


def test_weights_of_another_architecture_are_named(tmp_path):
    folder = save_sae(tmp_path, architecture="gated")
    with pytest.raises(FPOError, match="'b_mag' is missing for the architecture 'gated'"):
        load_coder(folder)


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    for key, value in (
        ("architecture", "transcoder"),
        ("rescale_acts_by_decoder_norm", True),  # of a JumpReLU
        ("normalize_activations", "expected_average_only_in"),
        ("reshape_activations", "hook_z"),
    ):
        folder = save_sae(tmp_path / key, **{key: value})
        with pytest.raises(FPOError, match=str(value).lower()):
            load_coder(folder)


def test_a_folder_that_is_no_sae_says_what_one_is(tmp_path):
    with pytest.raises(FPOError, match=r"the folder is empty.*sae-lens \(cfg\.json"):
        sae_folder(str(tmp_path))
    folder = save_sae(tmp_path / "cut")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(FPOError, match=r"sae_weights\.safetensors is missing or damaged"):
        load_coder(folder)
    (folder / "cfg.json").write_text('{"d_in": 1,\n}')
    with pytest.raises(FPOError, match=r"cfg\.json: not JSON \(line 2"):
        load_coder(folder)
    other = save_sae(tmp_path / "other", d_sae=7)
    with pytest.raises(FPOError, match=r"weights are \(32, 96\), cfg\.json says \(32, 7\)"):
        load_coder(other)


def test_the_shipped_sae_is_small_half_precision_and_readable_by_sae_lens():
    from safetensors.torch import load_file

    size = sum(path.stat().st_size for path in SHIPPED.iterdir())
    assert size < 12_000_000
    weights = load_file(SHIPPED / "sae_weights.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    ours, theirs = load_coder(SHIPPED), sae_lens_load(SHIPPED)
    assert 2304 <= ours.d_sae <= 4608
    x = 5 * torch.randn(20, ours.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_shipped_saes_quality_is_what_its_readme_says():
    """Measured again on text that neither it nor its report has seen: this project's own pairs."""
    from fpo_core.data.render import ChatFormat
    from fpo_core.data.text import Documents, token_windows
    from fpo_core.models.load import load_model, load_tokenizer, model_folder, prepare_cpu
    from fpo_core.recipe import load_recipe
    from fpo_core.recipe.schema import SaeTextSettings
    from fpo_core.sae.quality import sae_quality

    reported = json.loads((SHIPPED / "quality.json").read_text())
    recipe = load_recipe("quickstart")
    prepare_cpu(None)
    folder = model_folder(recipe.model.source)
    text = SaeTextSettings(path=recipe.data.heldout_sources[0].path, kind="preference")
    documents = Documents(ChatFormat(load_tokenizer(folder), recipe.data.template))
    windows = token_windows((text,), documents, length=256, max_tokens=2048)
    model = load_model(folder, dtype="float32", attention="sdpa")
    found = sae_quality(model, load_coder(SHIPPED), recipe.sae.hookpoint, windows)
    assert found["fvu"] == pytest.approx(1 - reported["explained_variance"], abs=0.1)
    assert found["explained_variance"] > 0.75
    assert found["loss_recovered"] > 0.93
    assert found["l0"] == pytest.approx(reported["l0"], rel=0.35)


def training_recipe(folder: Path, **changes: object) -> Path:
    """A recipe that trains an SAE on a tiny random model."""
    from tests.tiny import save_recipe

    path = save_recipe(folder / "r")
    text = folder / "text.jsonl"
    words = ["fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps"]
    text.write_text(
        "".join(
            json.dumps({"text": " ".join(words[(n * k) % 8] for k in range(1, 60))}) + "\n"
            for n in range(40)
        )
    )
    train = {
        "text": [{"path": str(text), "kind": "text"}], "context_length": 16,
        "max_tokens": 3000, "d_sae": 64, "k": 8, "steps": 300, "batch_tokens": 128,
        "lr": 3e-3, "warmup_steps": 10, "heldout_share": 0.1, **changes,
    }  # fmt: skip
    values = json.loads(path.read_text())
    values["sae"] = {"layer": 1, "train": train}
    path.write_text(json.dumps(values))
    return path


def trained(store: Path) -> Path:
    """The folder of the one SAE that a store holds."""
    from storage.catalog import list_artifacts
    from storage.location import open_store

    opened = open_store(store)
    (info,) = list_artifacts(opened)
    return opened.artifact("sae", info.version).folder("sae")


def test_the_sae_stage_trains_one_that_beats_its_start(fpo, tmp_path):
    """On a tiny random model: collected activations, sae-lens' trainer, quality, an artifact."""
    path = training_recipe(tmp_path)
    result = fpo("run", path, "--store", tmp_path / "store", "--only", "sae")
    assert result.code == 0, result.err
    folder = trained(tmp_path / "store")
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["fvu"] == pytest.approx(1 - quality["explained_variance"])
    assert quality["fvu"] < 0.5
    assert 4 < quality["l0"] < 16
    ours, theirs = load_coder(folder), sae_lens_load(folder)
    assert theirs.cfg.metadata["hook_name"] == "blocks.1.hook_resid_post"
    # ChatML's BOS opens every turn: windows begin with no other token than the text's.
    assert theirs.cfg.metadata["prepend_bos"] is False
    assert json.loads((folder / "cfg.json").read_text())["dtype"] == "float16"
    x = 3 * torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-4, atol=1e-4)
    assert (ours.encode(x) > 0).any()
    again = fpo("run", path, "--store", tmp_path / "store", "--only", "sae")
    assert "reused" in again.err


def test_fewer_activations_than_a_batch_are_told_before_any_is_collected(tmp_path):
    from tasks.run import prepare_run
    from tasks.sae import sae

    path = training_recipe(tmp_path, batch_tokens=4096, max_tokens=1600)
    (tmp_path / "r" / "model" / "model.safetensors").write_bytes(b"no weights: they are not read")
    run, _ = prepare_run(str(path), [], str(tmp_path / "store"), only="sae")
    with pytest.raises(FPOError, match=r"batch_tokens=4096 is more than the 1350 activations"):
        sae.fn(run)


def test_activations_without_sinks_may_be_fewer_than_a_batch(tmp_path):
    from fpo_core.recipe.schema import SaeTrainSettings
    from fpo_core.sae.train import train_sae

    settings = SaeTrainSettings(text=(), d_sae=12, k=2, steps=3, batch_tokens=64, lr=1e-3)
    values = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    values[5] *= 1000
    rows = Activations(tmp_path / "rows", "w+", values.shape)
    rows.put(0, values)
    with pytest.raises(FPOError, match=r"batch_tokens=64 is more than the 63 activations"):
        train_sae(rows, settings, {}, tmp_path / "sae")


TRAIN = """
import sys
from tasks.run import prepare_run
from tasks.sae import sae
recipe, store, minutes = sys.argv[1:]
overrides = [f"resources.checkpoint_minutes={minutes}", "sae.site=mlp_out"]
sae.fn(prepare_run(recipe, overrides, store, only="sae")[0])
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, caplog):
    """SIGKILL in mid-training; features are dead by then, and the counts of that go on, too."""
    from tasks.run import prepare_run
    from tasks.sae import sae

    path = training_recipe(tmp_path, d_sae=256, k=3, steps=260)

    def run(store, *overrides):
        overrides = ("sae.site=mlp_out", *overrides)
        sae.fn(prepare_run(str(path), overrides, str(tmp_path / store), only="sae")[0])
        return trained(tmp_path / store)

    killed = subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(path), str(tmp_path / "killed"), "0"],
        cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    whole = run("whole")
    steps: list[int] = []
    deadline = time.monotonic() + 120
    saved = "artifacts/sae/*/checkpoints/step-*/saved.json"
    while killed.poll() is None and time.monotonic() < deadline:
        steps = [int(p.parent.name[5:]) for p in (tmp_path / "killed").glob(saved)]
        if max(steps, default=0) >= 40:
            break
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, killed.stderr and killed.stderr.read()
    assert len(steps) <= 2  # the newest, and the one before while it is stored
    with caplog.at_level("INFO", logger="fpo"):
        resumed = run("killed")
    (step,) = re.findall(r"SAE training goes on after step (\d+)", caplog.text)
    assert 40 <= int(step) < 260
    for name in ("sae_weights.safetensors", "cfg.json", "quality.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    config = json.loads((resumed / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.1.hook_mlp_out"
    assert config["metadata"]["num_dead_features"] > 0
    assert not list((tmp_path / "killed").glob(saved))


@pytest.mark.slow
def test_a_state_that_cannot_be_used_is_said(tmp_path):
    from fpo_core.recipe.schema import SaeTrainSettings
    from fpo_core.sae.train import ActivationOrder, _trainer
    from fpo_core.sae.train_state import load_training, save_training

    rows = Activations(tmp_path / "rows", "w+", (64, 8))
    rows.put(0, np.random.default_rng(0).normal(size=rows.shape).astype(np.float32))

    def trainer(width):
        settings = SaeTrainSettings(
            text=(), d_sae=width, k=2, steps=10, batch_tokens=16, lr=1e-3, warmup_steps=2
        )
        return _trainer(ActivationOrder(rows, np.arange(64), 16, 0, 1.0), settings, {}, "cpu")

    one = trainer(12)
    torch.manual_seed(7)
    save_training(one, tmp_path)
    drawn = torch.rand(3)
    load_training(trainer(12), tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    with pytest.raises(FPOError, match="size mismatch.*--only sae --force"):
        load_training(trainer(13), tmp_path)
    state = tmp_path / "trainer_state.pt"
    state.write_bytes(pickle.dumps(Path("/"), protocol=2))
    with pytest.raises(FPOError, match="cannot be used"):
        load_training(one, tmp_path)
