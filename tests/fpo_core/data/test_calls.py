"""Calls and thoughts that a template does not render: none vanishes unsaid."""

import pytest

from fpo_core.data.conversations.model import ASSISTANT, TOOL, USER, Conversation, Turn
from fpo_core.data.drops import DroppedPair
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from tests.tiny import make_tokenizer


def pair(*prompt: Turn, chosen: Turn) -> Conversation:
    return Conversation(prompt, (chosen,), (Turn(ASSISTANT, "No."),), "d.jsonl, line 1")


def tokenize(given_pair: Conversation) -> TokenizedPair | DroppedPair:
    tokenizer = Tokenizer(ChatFormat(make_tokenizer(), "model"), Limits(None, 5000))
    (found,) = tokenizer.tokenize([given_pair])
    return found


SO = Turn(ASSISTANT, "So.")

CALL = ("function_call", {"name": "w"})


@pytest.mark.parametrize("extra", [CALL, ("tool_calls", [{"function": {"name": "w"}}])])
def test_a_call_that_is_not_rendered_drops_the_pair_wherever_it_is(extra):
    call = Turn(ASSISTANT, "", (extra,))
    asked = (Turn(USER, "Weather?"), call, Turn(TOOL, "3 C"))
    for given_pair in (pair(*asked, chosen=SO), pair(Turn(USER, "Weather?"), chosen=call)):
        found = tokenize(given_pair)
        assert isinstance(found, DroppedPair)
        assert (found.reason, extra[0] in found.detail) == ("not_rendered", True)


def test_a_thought_of_an_earlier_turn_may_be_left_out_and_one_of_an_answer_not():
    thought = Turn(ASSISTANT, "Hm.", (("reasoning_content", "Let me see."),))
    asked = (Turn(USER, "a"), thought, Turn(USER, "b"))
    assert isinstance(tokenize(pair(*asked, chosen=SO)), TokenizedPair)
    found = tokenize(pair(Turn(USER, "a"), chosen=thought))
    assert isinstance(found, DroppedPair)
    assert found.reason == "not_rendered"
