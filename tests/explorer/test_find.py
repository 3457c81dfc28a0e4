"""Features of a domain, beside a plain loop over texts, tokens and features."""

import json

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from explorer.errors import NotReadable
from explorer.find import STRONGEST, find_features, read_texts
from fpo_core.errors import UsageError
from fpo_core.sae.coder import load_coder
from tasks.run import prepare_run
from tests.tiny import SAE_LAYER

POSITIVE = ["- the fox - the dog", "- fox", "-- the lazy dog -"]
NEGATIVE = ["the fox jumps over the dog", "a quick brown fox", "x"]


def plainly(folder, coder, texts):
    """Share of texts with a feature among a token's strongest, and mean over tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    strong, every = [], []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            acts = coder.encode(hidden[SAE_LAYER + 1][0, 1:].float()).numpy()
        found = set()
        for token in acts:
            order = sorted(range(len(token)), key=lambda f, t=token: (-t[f], f))
            found |= {feature for feature in order[:STRONGEST] if token[feature] > 0}
        strong.append([float(feature in found) for feature in range(acts.shape[1])])
        every.append(acts)
    return np.mean(strong, 0), np.concatenate(every).mean(0)


def test_alignment_and_averages_are_those_of_a_plain_loop(finished_run, browsed):
    run, _ = prepare_run(str(finished_run.recipe), [], str(browsed))
    folder = finished_run.recipe.parent
    coder = load_coder(folder / "sae")
    (strong, mean), (strong_not, mean_not) = (
        plainly(folder / "model", coder, texts) for texts in (POSITIVE, NEGATIVE)
    )
    found = find_features(run, POSITIVE, NEGATIVE)
    expected = [f for f in range(96) if strong[f] > strong_not[f] and mean[f] > mean_not[f]]
    assert sorted(found["feature"].to_list()) == expected
    assert expected
    for row in found.to_dicts():
        feature = row["feature"]
        assert row["alignment"] == pytest.approx(strong[feature] - strong_not[feature])
        assert row["mean_positive"] == pytest.approx(mean[feature], rel=1e-4)
        assert row["mean_negative"] == pytest.approx(mean_not[feature], rel=1e-4, abs=1e-6)
    assert found["alignment"].is_sorted(descending=True)


def test_fpo_cache_find_writes_a_group(fpo, finished_run, browsed, tmp_path):
    for name, texts in (("yes.txt", POSITIVE), ("no.txt", NEGATIVE)):
        (tmp_path / name).write_text("\n".join(texts))
    done = fpo(
        "cache", "find", finished_run.recipe, "--positive", tmp_path / "yes.txt", "--negative",
        tmp_path / "no.txt", "--group", tmp_path / "g.yaml", "--name", "lists", "--json", "-n", 3,
        "--store", browsed,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    (group,) = yaml.safe_load((tmp_path / "g.yaml").read_text())["train"]["groups"]
    assert group["features"] == sorted(row["feature"] for row in rows)


def test_files_of_texts(tmp_path):
    lines, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("one\n\n two \n")
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_texts(lines) == read_texts(rows) == ["one", "two"]
    rows.write_text('{"text": "one"}\n{"words": 2}\n')
    with pytest.raises(NotReadable, match=r"a\.jsonl, line 2: no JSON with `text`"):
        read_texts(rows)
    lines.write_text("\n")
    with pytest.raises(UsageError, match="has no texts"):
        read_texts(lines)
    with pytest.raises(NotReadable, match="gone.txt: cannot be read"):
        read_texts(tmp_path / "gone.txt")
