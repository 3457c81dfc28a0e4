"""Random conversations in every shape give the ids that transformers' own template gives."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fpo_core.data.conversations.model import Conversation
from fpo_core.data.conversations.reader import Reading, read_source
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from fpo_core.recipe.data import Constant
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
CHAT = ChatFormat(TOKENIZER, "model")
NEWLINE = TOKENIZER("\n", add_special_tokens=False)["input_ids"]
# The same text; transformers finds what the assistant says in it.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
Said = tuple[str, ...]  # texts of turns, the user's and the assistant's in turn
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


class Talk(NamedTuple):
    """A conversation that goes on in two ways."""

    system: str | None
    shared: Said  # begins with the user
    chosen: Said  # goes on after the shared turns, and ends with the assistant
    rejected: Said

    def turns(self, side: Said | None = None) -> list[dict[str, str]]:
        """Return the shared turns, followed by a side's."""
        texts = (*self.shared, *(side or ()))
        spoken = [
            {"role": ("user", "assistant")[place % 2], "content": text}
            for place, text in enumerate(texts)
        ]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *spoken]

    def rest(self, side: Said) -> list[dict[str, str]]:
        return self.turns(side)[len(self.turns()) :]

    @property
    def asks(self) -> bool:
        """Whether the shared turns end with the user, as a prompt does."""
        return len(self.shared) % 2 == 1

    @property
    def is_plain(self) -> bool:
        """Whether each side is one answer."""
        return self.asks and len(self.chosen) == len(self.rejected) == 1

    @property
    def texts(self) -> Said:
        return (*filter(None, [self.system]), *self.shared, *self.chosen, *self.rejected)


PIECES = st.sampled_from(
    [
        "Human:",
        "Assistant:",
        "\n\nHuman: ",
        "\n\n",
        "user\n",
        "[{",
        '"role"',
        "<|im_start|>user\n",
        "### Response:",
        "</s>",
        "\u2028",
        "\r\n",
        "é",
        "👩\u200d👧",
        "\x00",
        "the fox",
        "\ufffd",
        "{{",
        "%Y",
    ]
)
TEXT = (
    st.lists(PIECES | st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=4)
    .map("".join)
    .filter(str.strip)
)


@st.composite
def talks(draw) -> Talk:
    system = draw(st.none() | TEXT)
    shared = tuple(draw(st.lists(TEXT, min_size=1, max_size=7)))
    sizes = st.sampled_from((1, 3) if len(shared) % 2 else (2, 4))
    sides = [
        tuple(draw(st.lists(TEXT, min_size=size, max_size=size)))
        for size in (draw(sizes), draw(sizes))
    ]
    if sides[0][0] == sides[1][0]:
        sides[1] = (sides[1][0] + "!", *sides[1][1:])
    # Sides that repeat the shared turns would be whole conversations.
    assume(not any(shared == side[: len(shared)] for side in sides))
    return Talk(system, shared, sides[0], sides[1])


def sharegpt(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in turns]


def hh_text(turns: list[dict[str, str]]) -> str:
    marks = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{marks[turn['role']]}: {turn['content']}" for turn in turns)


def marks_nothing(talk: Talk) -> bool:
    """Whether a text with role markers can carry it: no text has a marker or outer white space."""
    return all(
        text == text.strip()
        and not re.search(r"\n\s*\n\s*(Human|Assistant|System):", text)
        and not text.startswith(("Human:", "Assistant:", "System:"))
        for text in talk.texts
    )


def no_dialogue(text: str) -> bool:
    return not re.match(r"\s*(Human|System):", text)


def trl(talk: Talk) -> dict[str, Any]:
    return {
        "prompt": talk.turns(),
        "chosen": talk.rest(talk.chosen),
        "rejected": talk.rest(talk.rejected),
    }


def implicit(talk: Talk) -> dict[str, Any]:
    return {"chosen": talk.turns(talk.chosen), "rejected": talk.turns(talk.rejected)}


def trailing(talk: Talk) -> dict[str, Any]:
    row = implicit(talk)
    return {side: [*turns, {"role": "user", "content": "Ta!"}] for side, turns in row.items()}


def ultrafeedback(talk: Talk) -> dict[str, Any] | None:
    if not no_dialogue(talk.shared[0]):
        return None
    row = implicit(talk)
    scores = {"score_chosen": 8.5, "score_rejected": 3.0}
    return {"prompt": talk.shared[0], **row, "messages": row["chosen"], **scores}


def sharegpt_pair(talk: Talk) -> dict[str, Any]:
    chosen, rejected = (sharegpt(talk.rest(side)) for side in (talk.chosen, talk.rejected))
    if talk.is_plain:
        chosen, rejected = chosen[0], rejected[0]
    return {"conversations": sharegpt(talk.turns()), "chosen": chosen, "rejected": rejected}


def hh_rlhf(talk: Talk) -> dict[str, Any] | None:
    if not marks_nothing(talk):
        return None
    return {
        "chosen": hh_text(talk.turns(talk.chosen)),
        "rejected": hh_text(talk.turns(talk.rejected)),
    }


def rm_static(talk: Talk) -> dict[str, Any] | None:
    if not (talk.is_plain and marks_nothing(talk)):
        return None
    return {
        "prompt": hh_text(talk.turns()) + "\n\nAssistant:",
        "response": f" {talk.chosen[0]}",
        "chosen": f" {talk.chosen[0]}",
        "rejected": f" {talk.rejected[0]}",
    }


def alpaca(talk: Talk) -> dict[str, Any] | None:
    if not (talk.is_plain and all(map(no_dialogue, talk.texts))):
        return None
    *earlier, asked = talk.shared
    rounds = [list(pair) for pair in zip(earlier[::2], earlier[1::2], strict=True)]
    return {
        "instruction": asked,
        "input": "",
        "history": rounds,
        "system": talk.system or "",
        "chosen": talk.chosen[0],
        "rejected": talk.rejected[0],
    }


def plain(talk: Talk) -> dict[str, Any] | None:
    row = alpaca(talk)
    if row is None or row["history"]:
        return None
    row = {"prompt": row["instruction"], **row}
    return {name: row[name] for name in ("prompt", "system", "chosen", "rejected")}


def json_text(talk: Talk) -> dict[str, Any]:
    return {side: json.dumps(turns, indent=1) for side, turns in implicit(talk).items()}


def json_text_prompt(talk: Talk) -> dict[str, Any]:
    return {name: json.dumps(turns, ensure_ascii=False) for name, turns in trl(talk).items()}


def arrow_nulls(talk: Talk) -> dict[str, Any]:
    """Columns and keys that Arrow fills in, since other rows of the file have them."""
    absent = {"from": None, "value": None, "tool_calls": None, "name": None, "weight": None}
    row = {name: [{**turn, **absent} for turn in turns] for name, turns in trl(talk).items()}
    others = ("conversations", "messages", "tools", "system", "images", "history", "instruction")
    return {**dict.fromkeys(others), "images": [], **row}


def parts(talk: Talk) -> dict[str, Any]:
    return {
        name: [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        for name, turns in implicit(talk).items()
    }


def openai(talk: Talk) -> dict[str, Any]:
    row = trl(talk)
    return {
        "input": {"messages": row["prompt"], "tools": []},
        "preferred_output": row["chosen"],
        "non_preferred_output": row["rejected"],
    }


def system_column(talk: Talk) -> dict[str, Any]:
    return {"system": talk.system, **implicit(talk._replace(system=None))}


SHAPES: list[Callable[[Talk], dict[str, Any] | None]] = [
    trl,
    implicit,
    trailing,
    ultrafeedback,
    sharegpt_pair,
    hh_rlhf,
    rm_static,
    alpaca,
    plain,
    json_text,
    json_text_prompt,
    arrow_nulls,
    parts,
    openai,
    system_column,
]


def read(file: Path, reading: Reading | None = None) -> list[Any]:
    return list(read_source(str(file), None, reading))


def of_jsonl(talk: Talk, folder: Path) -> dict[str, Any]:
    rows = {shape.__name__: shape(talk) for shape in SHAPES}
    rows = {name: row for name, row in rows.items() if row is not None}
    lines = [
        json.dumps(row, ensure_ascii=number % 2 == 0) + "\n"
        for number, row in enumerate(rows.values())
    ]
    (folder / "d.jsonl").write_bytes("".join(lines).encode())
    return dict(zip(rows, read(folder / "d.jsonl"), strict=True))


def of_parquet(talk: Talk, folder: Path) -> dict[str, Any]:
    """Rows of two shapes in one table, each with nulls for what only the other has."""
    rows = [
        {**trl(talk), "conversations": None},
        {**trl(talk), "prompt": None, "conversations": sharegpt(talk.turns())},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    found = read(folder / "d.parquet")
    return {f"parquet, row {number}": row for number, row in enumerate(found)}


def of_mapping(talk: Talk, folder: Path) -> dict[str, Any]:
    """Columns of other names, at paths, and a system prompt that is the same for all rows."""
    whole = trl(talk._replace(system=None))
    row = {
        "id": 3,
        "talk": {"so.far": whole["prompt"]},
        "prompt": "something else",
        "answers": [{"said": whole["rejected"]}, {"said": whole["chosen"]}],
    }
    (folder / "m.jsonl").write_text(json.dumps({**row, "talk.now": whole["prompt"]}))
    columns: dict[str, Any] = {
        "prompt": "talk.now",
        "chosen": "answers.-1.said",
        "rejected": "answers.0.said",
    }
    if talk.system is not None:
        columns["system"] = Constant(constant=talk.system)
    (found,) = read(folder / "m.jsonl", Reading(columns=columns))
    return {"mapping": found}


def expected(talk: Talk, side: Said) -> tuple[list[int], list[bool]]:
    """Ids of prompt and side up to the last end of turn, and which the assistant says."""
    encoding: Any = TOKENIZER.apply_chat_template(
        talk.turns(side),
        chat_template=MARKED,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    plain_ids: Any = TOKENIZER.apply_chat_template(talk.turns(side), tokenize=True)
    ids = encoding["input_ids"]
    assert ids == plain_ids["input_ids"]
    assert ids[-len(NEWLINE) :] == NEWLINE
    return ids[: -len(NEWLINE)], [bool(one) for one in encoding["assistant_masks"]]


@settings(max_examples=60, deadline=None)
@given(talks())
def test_every_shape_gives_the_ids_of_the_template_and_scores_the_assistants_tokens(talk):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {**of_jsonl(talk, folder), **of_parquet(talk, folder), **of_mapping(talk, folder)}
    assert len(found) >= 11
    wanted = [expected(talk, side) for side in (talk.chosen, talk.rejected)]
    opened: Any = TOKENIZER.apply_chat_template(
        talk.turns(), tokenize=True, add_generation_prompt=talk.asks
    )
    prompt = opened["input_ids"]
    for shape, conversation in found.items():
        assert isinstance(conversation, Conversation), (shape, conversation)
        (pair,) = Tokenizer(CHAT, Limits(None, 100_000)).tokenize([conversation])
        assert isinstance(pair, TokenizedPair), (shape, pair)
        assert pair.prompt_ids == prompt, shape
        sides = (
            (pair.chosen_ids, pair.chosen_unscored),
            (pair.rejected_ids, pair.rejected_unscored),
        )
        for (ids, mask), (side, unscored) in zip(wanted, sides, strict=True):
            assert [*pair.prompt_ids, *side] == ids, shape
            scored = [True] * len(side)
            for start, stop in zip(unscored[::2], unscored[1::2], strict=True):
                scored[start:stop] = [False] * (stop - start)
            assert scored == mask[len(prompt) : len(ids)], shape
