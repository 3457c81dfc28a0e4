"""Length limits: what is cut from prompts and answers, and what always stays."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, USER, Conversation, Turn
from fpo_core.data.drops import DroppedPair
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from tests.tiny import CHATML, make_tokenizer

TOKENIZER = make_tokenizer()
HEADER, OPENER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
END = [TOKENIZER.eos_token_id]


def count(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


AROUND = count(HEADER) + count(OPENER)


def digits(number: int) -> str:
    """A text of this many tokens, each of one digit."""
    return ("0123456789" * (number // 10 + 1))[:number]


def talk(
    *prompt: str,
    chosen: tuple[str, ...] = ("aaa",),
    rejected: tuple[str, ...] = ("bb",),
    system: str | None = None,
) -> Conversation:
    roles = (USER, ASSISTANT)
    turns = [Turn(roles[place % 2], text) for place, text in enumerate(prompt)]
    first = [] if system is None else [Turn(SYSTEM, system)]
    sides = [
        tuple(Turn(roles[(len(prompt) + place) % 2], text) for place, text in enumerate(side))
        for side in (chosen, rejected)
    ]
    return Conversation((*first, *turns), sides[0], sides[1], "d.jsonl, line 1")


def cut(given_talk: Conversation, length: int, most: int | None = None, **options: Any):
    """Tokenize; returns the result and the notes."""
    tokenizer = options.pop("tokenizer", TOKENIZER)
    limits = Limits(most, length, **options)
    work = Tokenizer(ChatFormat(tokenizer, "model"), limits)
    (found,) = work.tokenize([given_talk])
    return found, {*+work.notes}


def texts(pair: TokenizedPair) -> tuple[str, str, str]:
    prompt, chosen, rejected = (
        str(TOKENIZER.decode(ids)) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    return prompt, chosen, rejected


# --- prompts


def test_a_pair_that_fits_is_never_cut_whatever_the_prompts_own_limit():
    """The authors' rule: a prompt's limit counts only where the whole is too long."""
    given_talk = talk(digits(40))
    found, notes = cut(given_talk, 200, 10, truncation="keep_end")
    whole, _ = cut(given_talk, 200)
    assert found == whole
    assert notes == set()
    dropped, _ = cut(given_talk, 200, 10)
    assert isinstance(dropped, DroppedPair)


@pytest.mark.parametrize(
    ("truncation", "left"), [("keep_start", "0123456789"), ("keep_end", "4567890123")]
)
def test_a_cut_prompt_keeps_its_start_or_end_and_what_the_template_writes_around_it(
    truncation, left
):
    given_talk = talk(digits(64), chosen=(digits(30),))
    found, notes = cut(given_talk, AROUND + 41, AROUND + 10, truncation=truncation)
    assert texts(found) == (HEADER + left + OPENER, digits(30) + "<|im_end|>", "bb<|im_end|>")
    assert notes == {"prompt_cut"}
    assert found.lengths.prompt == AROUND + 64
    assert found.kept_lengths.prompt == AROUND + 10


def test_a_prompt_without_a_limit_gets_what_the_longest_answer_leaves_and_half_at_least():
    given_talk = talk(digits(100), chosen=(digits(29),))
    found, _ = cut(given_talk, 100, truncation="keep_end")
    assert len(found.prompt_ids) == 70
    assert len(found.chosen_ids) == 30
    long = talk(digits(100), chosen=(digits(90),))
    found, notes = cut(long, 100, truncation="keep_end", truncate_answers=True)
    assert (len(found.prompt_ids), len(found.chosen_ids)) == (50, 50)
    assert notes == {"prompt_cut", "answer_cut"}
    dropped, _ = cut(long, 100, truncation="keep_end")
    assert (dropped.reason, dropped.lengths.prompt) == ("too_long", AROUND + 100)


def test_keep_end_counts_whole_turns_first_and_keeps_the_system_prompt():
    given_talk = talk("first", digits(30), "second", "yes", "third", system="Be brief.")
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    second = f"{HEADER}second<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    third = f"{HEADER}third{OPENER}"
    for size, prompt in (
        (count(system + second + third), system + second + third),
        (count(system + second + third) - 1, system + third),
        (count(system + third), system + third),
        (count(system + third) - 1, system + third.replace("third", third[len(HEADER) + 1 :][:4])),
    ):
        found, _ = cut(given_talk, size + 3, size, truncation="keep_end", truncate_answers=True)
        decoded = TOKENIZER.decode(found.prompt_ids)
        assert len(found.prompt_ids) <= size
        if size >= count(system + third):
            assert decoded == prompt
        else:
            assert decoded.startswith(system + HEADER)
            assert decoded.endswith(OPENER)
            assert "third" not in decoded
            assert len(found.prompt_ids) == size


def test_keep_start_of_several_turns_keeps_the_assistants_opener():
    given_talk = talk(digits(30), "yes", "third")
    found, _ = cut(
        given_talk, AROUND + 13, AROUND + 10, truncation="keep_start", truncate_answers=True
    )
    assert TOKENIZER.decode(found.prompt_ids) == HEADER + digits(10) + OPENER


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("most", [1, 5, AROUND - 1, AROUND])
def test_limits_that_leave_no_room_for_the_text_drop_the_pair(truncation, most):
    """A prompt never loses its opener or the assistant's."""
    found, _ = cut(talk(digits(90)), 95, most, truncation=truncation, truncate_answers=True)
    assert isinstance(found, DroppedPair)
    assert found.reason == "prompt_too_long"


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_system_prompt_that_fills_the_limit_drops_the_pair_and_says_so(truncation):
    given_talk = talk(digits(50), system=digits(60))
    found, _ = cut(given_talk, 90, 50, truncation=truncation, truncate_answers=True)
    assert (found.reason, found.detail) == (
        "prompt_too_long",
        "the system prompt alone fills max_prompt_length",
    )


def test_a_partial_answer_in_the_prompt_cannot_be_cut():
    given_talk = talk(digits(50), "It has")._replace(
        chosen=(Turn(ASSISTANT, " eight."),), rejected=(Turn(ASSISTANT, " six."),)
    )
    found, _ = cut(given_talk, 60, 40, truncation="keep_end", truncate_answers=True)
    assert (found.reason, "assistant turn" in found.detail) == ("prompt_too_long", True)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_cut_prompt_has_the_opener_of_an_answered_conversation(truncation):
    """Where the template opens a thought for generation, whole prompts do not have it either."""
    tokenizer = make_tokenizer()
    opener = "'<|im_start|>assistant\n'"
    tokenizer.chat_template = CHATML.replace(opener, opener[:-1] + "<think>'")
    found, _ = cut(
        talk(digits(60)),
        AROUND + 15,
        AROUND + 10,
        truncation=truncation,
        truncate_answers=True,
        tokenizer=tokenizer,
    )
    assert TOKENIZER.decode(found.prompt_ids).endswith(OPENER)


# --- answers


def test_a_cut_answer_has_no_end_of_turn_unless_the_recipe_asks_for_it():
    given_talk = talk("why", chosen=(digits(50),))
    room = 20
    length = AROUND + count("why") + room
    dropped, _ = cut(given_talk, length)
    assert (dropped.reason, "data.max_length is" in dropped.detail) == ("too_long", True)
    found, notes = cut(given_talk, length, truncate_answers=True)
    assert texts(found)[1:] == (digits(room), "bb<|im_end|>")
    assert notes == {"answer_cut"}
    found, _ = cut(given_talk, length, truncate_answers="with_end")
    assert texts(found)[1:] == (digits(room - 1) + "<|im_end|>", "bb<|im_end|>")


def test_answers_that_are_the_same_up_to_the_cut_are_identical():
    given_talk = talk("why", chosen=(digits(50) + "a",), rejected=(digits(50) + "b",))
    found, _ = cut(given_talk, AROUND + 3 + 20, truncate_answers=True)
    assert (found.reason, "up to where they are cut" in found.detail) == ("identical", True)


FIRST = count("0123456789") + 1  # with its end of turn
BETWEEN = count("\n" + HEADER + "go on" + OPENER)
SEVERAL = talk("why", chosen=(digits(10), "go on", digits(20)), rejected=("bb",))


@pytest.mark.parametrize("truncate", [True, "with_end"])
@pytest.mark.parametrize("room", range(1, FIRST + BETWEEN + 22))
def test_a_side_of_several_turns_is_cut_without_an_unscored_end(room, truncate):
    """Nothing is learnt from a last question, and no range reaches past the end."""
    length = AROUND + count("why") + room
    found, _ = cut(SEVERAL, length, truncate_answers=truncate)
    whole, _ = cut(SEVERAL, 1000)
    assert whole.chosen_unscored == [FIRST, FIRST + BETWEEN]
    if isinstance(found, DroppedPair):
        assert room == 1
        assert truncate == "with_end"
        return
    ids, ranges = found.chosen_ids, found.chosen_unscored
    assert len(ids) <= room
    kept = ids if ids == whole.chosen_ids or truncate is True else ids[:-1]
    assert kept == whole.chosen_ids[: len(kept)]
    in_second = len(kept) > FIRST + BETWEEN
    assert ranges == ([FIRST, FIRST + BETWEEN] if in_second else [])
    if truncate == "with_end":
        assert ids[-1:] == END
        assert ids[-2:] != [*END, *END]
    elif FIRST <= room <= FIRST + BETWEEN:
        assert len(ids) == FIRST  # up to the end of the first answer, which is its own


SIZES = st.integers(1, 60)


@settings(deadline=None)
@given(
    st.lists(SIZES, min_size=1, max_size=5).filter(lambda sizes: len(sizes) % 2 == 1),
    st.tuples(SIZES, SIZES),
    st.integers(2, 150),
    st.none() | st.integers(1, 100),
    st.sampled_from(["drop", "keep_start", "keep_end"]),
    st.sampled_from([False, True, "with_end"]),
)
def test_whatever_is_kept_fits_and_keeps_the_openers(
    sizes, answers, length, most, truncation, truncate
):
    if most is not None and most >= length:
        most = None
    given_talk = talk(
        *map(digits, sizes),
        chosen=("a" + digits(answers[0]),),
        rejected=("b" + digits(answers[1]),),
    )
    found, _ = cut(given_talk, length, most, truncation=truncation, truncate_answers=truncate)
    whole, _ = cut(given_talk, 10_000)
    if isinstance(found, DroppedPair):
        assert found.reason in ("too_long", "prompt_too_long", "identical")
        assert found.lengths == whole.lengths
        return
    prompt, chosen, rejected = texts(found)
    assert len(found.prompt_ids) + max(len(found.chosen_ids), len(found.rejected_ids)) <= length
    assert prompt.startswith(HEADER)
    assert prompt.endswith(OPENER)
    if truncation == "drop" or whole.lengths.longest <= length:
        assert found.prompt_ids == whole.prompt_ids
    elif most is not None and whole.lengths.prompt > most:
        assert len(found.prompt_ids) <= most
    for ids, full in (
        (found.chosen_ids, whole.chosen_ids),
        (found.rejected_ids, whole.rejected_ids),
    ):
        kept = ids[:-1] if truncate == "with_end" else ids
        assert kept == full[: len(kept)]
        assert truncate or ids == full
    assert chosen[0] + rejected[0] == "ab"
