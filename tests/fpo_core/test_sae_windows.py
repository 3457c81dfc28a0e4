"""What an SAE is trained on: windows that begin as the pairs do, stored without overflow."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from fpo_core.data.render import ChatFormat
from fpo_core.data.text import Documents, token_windows
from fpo_core.errors import FPOError
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.hooks import activations_at
from fpo_core.models.random_gemma import train_tokenizer
from fpo_core.recipe.schema import SaeTextSettings, SaeTrainSettings
from fpo_core.sae.coder import load_coder
from fpo_core.sae.collect import Activations, collect_activations
from fpo_core.sae.health import health_sums, sae_health
from fpo_core.sae.train import train_sae
from tests.fpo_core.test_sae import sae_lens_load, trained, training_recipe
from tests.tiny import CHATML, HIDDEN, make_model, make_tokenizer

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def with_bos(template: str = CHATML) -> Any:
    """The tiny tokenizer with a BOS of its own, which its template writes in front."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = "{{ bos_token }}" + template
    return tokenizer


def other(**attributes: Any) -> Any:
    """The same tokenizer with other attributes."""
    tokenizer = with_bos()
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "template", "bos"),
    [
        (with_bos(), "model", "<bos>"),
        (with_bos(), "halos", "<bos>"),
        (train_tokenizer(), "halos", "<bos>"),
        (other(chat_template=LLAMA_2), "model", "<bos>"),  # in front of every question
        (other(bos_token="<|im_end|>"), "halos", "<|im_end|>"),  # GPT-2: EOS as well
        (make_tokenizer(), "halos", "<|im_start|>"),
        (make_tokenizer(), "model", ""),  # SmolLM2: opens every turn
        (other(chat_template=CHATML), "model", ""),  # there is one, and no text begins with it
        (other(bos_token=None), "model", ""),
    ],
    ids=["model", "halos", "gemma", "llama-2", "eos", "chatml-halos", "chatml", "unused", "none"],
)
def test_bos_is_what_rendered_texts_begin_with(tokenizer, template, bos):
    assert ChatFormat(tokenizer, template).bos == tuple(
        tokenizer.convert_tokens_to_ids([bos] if bos else [])
    )


def windows_of(path, kind, documents, length=8, rows=()):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SaeTextSettings(path=str(path), kind=kind)
    return token_windows((source,), documents, length=length, max_tokens=1000).tolist()


@pytest.mark.parametrize("tokenizer", [with_bos(), make_tokenizer()], ids=["bos", "none"])
def test_every_window_begins_with_bos_where_the_pairs_do(tokenizer, tmp_path):
    text = "the quick brown fox jumps over the lazy dog " * 4
    chat = ChatFormat(tokenizer, "model")
    found = windows_of(tmp_path / "t.jsonl", "text", Documents(chat), rows=[{"text": text}])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = list(chat.bos)
    own = 8 - len(bos)
    whole = len(ids) // own * own
    assert found == [[*bos, *ids[at : at + own]] for at in range(0, whole, own)]


@pytest.mark.parametrize("template", ["model", "halos"])
def test_conversations_are_rendered_with_the_recipes_template(template, tmp_path):
    tokenizer = with_bos()
    pair = {"prompt": "the fox", "chosen": "jumps over", "rejected": "is a dog"}
    documents = Documents(ChatFormat(tokenizer, template))
    (first, *rest) = windows_of(tmp_path / "p.jsonl", "preference", documents, 6, [pair])
    before, after = {
        "model": ("<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
        "halos": ("<|user|>\nthe fox\n<|assistant|>\n", "<|im_end|>"),
    }[template]
    texts = [before + pair[side] + after for side in ("chosen", "rejected")]
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    stream = [token for window in (first, *rest) for token in window[1:]]
    assert {window[0] for window in (first, *rest)} == {tokenizer.bos_token_id}
    assert stream in [(a + b)[: len(stream)], (b + a)[: len(stream)]]
    assert tokenizer.bos_token_id not in stream
    assert len(a + b) - len(stream) < 5


def test_a_system_turn_follows_the_recipes_rule(tmp_path):
    """As in the tokenize stage; before, the template's refusal left such rows out."""
    tokenizer = with_bos(NO_SYSTEM + CHATML)
    turns = [("system", "be quick"), ("user", "the fox"), ("assistant", "jumps")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    chat = ChatFormat(tokenizer, "model")
    found = windows_of(
        tmp_path / "i.jsonl", "instruction", Documents(chat, "fold"), 4, [row, row, row]
    )
    text = tokenizer.decode([token for window in found for token in window[1:]])
    assert "<|im_start|>user\nbe quick\n\nthe fox<|im_end|>" in text
    with pytest.raises(FPOError, match=r"data\.system=fold"):
        windows_of(tmp_path / "i.jsonl", "instruction", Documents(chat), 4, [row])


def test_the_stage_declares_what_it_trained_on(fpo, tmp_path):
    """BOS enters the version where there is one, and its position is not trained on."""
    path = training_recipe(tmp_path, steps=20, max_tokens=2000)
    store = tmp_path / "store"
    assert "bos" not in planned(path, store).recipe
    with_bos().save_pretrained(tmp_path / "r" / "model")
    plan = planned(path, store)
    assert plan.recipe["bos"] == [with_bos().bos_token_id]
    result = fpo("run", path, "--store", store, "--only", "sae")
    assert result.code == 0, result.err
    folder = trained(store)
    assert load_coder(folder).prepend_bos
    declared = sae_lens_load(folder).cfg.metadata
    assert declared["prepend_bos"] is True
    # 125 windows of 16 tokens, BOS included; 12 of them are for the report.
    assert declared["training_tokens"] == (125 - 12) * 15
    quality = json.loads((folder / "quality.json").read_text())
    assert 0 < quality["tokens"] <= 12 * 15


def planned(path, store):
    from tasks.run import prepare_run

    return prepare_run(str(path), [], str(store), only="sae")[0].planned("sae")


def test_template_and_system_rule_enter_the_version_of_rendered_text_alone(tmp_path):
    from tasks.run import prepare_run

    path = training_recipe(tmp_path)
    values = json.loads(path.read_text())

    def version(kind, *overrides):
        values["sae"]["train"]["text"][0]["kind"] = kind
        path.write_text(json.dumps(values))
        run, _ = prepare_run(str(path), overrides, str(tmp_path / "store"), only="sae")
        return run.planned("sae").version

    assert version("text", "data.system=drop") == version("text")
    assert version("preference", "data.system=drop") != version("preference")
    assert version("preference", "data.template=halos") != version("preference")


def test_bos_is_not_collected_and_large_activations_do_not_overflow(tmp_path):
    """A residual stream of 1e5 and more: no infinity, and the SAE is as good as on float32."""
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3e5)
    windows = torch.randint(2, 400, (40, 16), generator=torch.Generator().manual_seed(0))
    windows[:, 0] = 0
    exact = activations_at(model, Hookpoint(1), windows)[:, 1:].reshape(-1, HIDDEN).numpy()
    assert np.abs(exact).max() > 1e5
    stored = collect_activations(model, windows, Hookpoint(1), tmp_path / "a")
    assert stored.shape == exact.shape == (40 * 15, HIDDEN)
    assert np.abs(stored[:] - exact).max() <= 2**-11 * np.abs(exact).max()
    settings = SaeTrainSettings(
        text=(), d_sae=128, k=8, steps=150, batch_tokens=128, lr=3e-3, warmup_steps=10
    )
    fvu = []
    sources: tuple[tuple[str, Any], ...] = (("stored", stored), ("exact", exact))
    for name, rows in sources:
        train_sae(rows, settings, {}, tmp_path / name)
        coder, x = load_coder(tmp_path / name), torch.from_numpy(exact)
        assert all(bool(t.isfinite().all()) for t in (coder.W_enc, coder.W_dec, coder.b_dec))
        sums = health_sums(coder, x, torch.zeros(len(x), dtype=torch.int64), 1)
        fvu.append(sae_health(sums)["fvu"].value)
    assert fvu[0] == pytest.approx(fvu[1], abs=0.01)
    assert fvu[0] < 0.6


def test_activations_that_float16_holds_are_stored_as_such(tmp_path):
    values = np.random.default_rng(0).normal(scale=1000, size=(50, 8)).astype(np.float32)
    values[3] *= 1000
    stored = Activations(tmp_path / "rows", "w+", values.shape)
    stored.put(0, values)
    stored.flush()
    again = Activations(tmp_path / "rows", "r+", values.shape)
    small = np.abs(values).max(axis=1) < 2**15
    np.testing.assert_array_equal(again[small], values[small].astype(np.float16))
    np.testing.assert_allclose(again[:], values, rtol=2**-11, atol=1e-4)
