"""Turns from messages as people write them: `role`/`content`, `from`/`value`, parts, JSON text."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, TOOL, USER, Turn
from fpo_core.data.drops import Unusable

ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "human": USER,
    "prompter": USER,
    "prompt": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "gpt4": ASSISTANT,
    "gpt-4": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "claude": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "chatbot": ASSISTANT,
    "ai": ASSISTANT,
    "tool": TOOL,
    "function": TOOL,
    "ipython": TOOL,
    "observation": TOOL,
    "function_response": TOOL,
    "tool_response": TOOL,
}
ROLE_KEYS = ("role", "from", "speaker", "sender")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Parts of a turn that templates render; everything else of a message is provenance.
EXTRA_KEYS = (
    "tool_calls",
    *REASONING_KEYS,
    "name",
    "tool_call_id",
    "function_call",
)
MESSAGE_KEYS = frozenset({*ROLE_KEYS, *CONTENT_KEYS, *EXTRA_KEYS, "weight"})
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
_PLAIN_KEYS = {"role", "content"}
_MESSAGES_KEYS = ("messages", "conversations", "conversation", "turns")
# Messages as text begin like this, in JSON or as Python and NumPy print them.
_MESSAGES_TEXT = re.compile(
    r"""\s*["']?\s*\[?\s*\{\s*\\?["'](role|from|content|value)\\?["']\s*:""", re.ASCII
)
_KNOWN_ROLE = re.compile(
    r"""["'](role|from)\\?["']\s*:\s*\\?["'](system|user|human|assistant|gpt)\\?["']"""
)
# Rounds of a question and its answer, as capybara, xtuner and MOSS have them.
_ROUNDS = (("input", "output"), ("user", "assistant"), ("human", "assistant"))


def is_absent(value: Any) -> bool:
    """Return whether a value is one that Arrow or a writer fills in for nothing."""
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def turn_of(message: Any, default_role: str | None = None) -> Turn:
    """Read one message.

    Args:
        message: a mapping with a role and a content.
        default_role: the role of a message that names none.

    Raises:
        Unusable: unknown role, content that is not text.
    """
    if type(message) is dict and message.keys() == _PLAIN_KEYS:  # most messages of most files
        role, content = message["role"], message["content"]
        if type(role) is type(content) is str and role in ROLES:
            return Turn(ROLES[role], content)
    if not isinstance(message, Mapping):
        raise Unusable("not_text", f"a turn is {kind_name(message)}, expected role and content")
    media = next((key for key in MEDIA_KEYS if not is_absent(message.get(key))), None)
    if media:
        raise Unusable("images", f"a turn has {media!r}, this pipeline reads text only")
    role = _role(message, default_role)
    extra = tuple(
        (key, _extra(key, message[key]))
        for key in EXTRA_KEYS
        if not is_absent(message.get(key)) and message[key] != ""
    )
    return Turn(
        role=role,
        content=_content(message, role),
        extra=extra,
        is_learnt=message.get("weight") != 0,
    )


def _content(message: Mapping[str, Any], role: str) -> str:
    found = [key for key in CONTENT_KEYS if message.get(key) is not None]
    texts = [text_of(message[key], f"the {role} turn's {key}") for key in found]
    said = [(key, text) for key, text in zip(found, texts, strict=True) if text]
    for key, text in said[1:]:
        if text != said[0][1]:
            raise Unusable("ambiguous_turn", f"a turn's {said[0][0]!r} and {key!r} differ")
    return said[0][1] if said else ""


def _extra(key: str, value: Any) -> Any:
    """Return a turn's extra part as templates take it: calls may be JSON text, nulls are left out.

    Raises:
        Unusable: calls that are no list of objects.
    """
    if key != "tool_calls":
        return without_nulls(value)
    calls = objects_of(value)
    if calls is None:
        raise Unusable("unsupported", "`tool_calls` is not a list of calls")
    return calls


def objects_of(value: Any) -> list[Any] | None:
    """Return a list of objects, which may be JSON text or hold JSON texts; None for anything else.

    Nulls inside are left out: Arrow fills them in, and `datasets` writes them to JSON.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value, strict=False)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    found: list[Any] = []
    for each in value:
        inner = objects_of(each) if isinstance(each, str) else [each]
        if inner is None or not all(isinstance(one, Mapping) for one in inner):
            return None
        found += [without_nulls(one) for one in inner]
    return found


def without_nulls(value: Any) -> Any:
    """Return plain values without the keys that are null, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def turns_of(messages: Any, what: str) -> list[Turn]:
    """Read a list of messages, which may also be JSON text or one message.

    Raises:
        Unusable: the value is no list of messages.
    """
    if isinstance(messages, str):
        parsed = parsed_messages(messages)
        if parsed is None:
            raise Unusable("not_text", f"{what} is text, expected a list of messages")
        messages = parsed
    if isinstance(messages, Mapping):
        inner = next((messages[key] for key in _MESSAGES_KEYS if messages.get(key)), None)
        return turns_of(inner, what) if inner is not None else [turn_of(messages)]
    if not isinstance(messages, Sequence):
        raise Unusable("not_text", f"{what} is {kind_name(messages)}, expected a list of messages")
    return [turn for message in messages for turn in _turns_of_one(message)]


def _turns_of_one(message: Any) -> list[Turn]:
    """Read a message, or a round of a question and its answer."""
    if isinstance(message, Mapping) and not any(message.get(key) for key in ROLE_KEYS):
        for asked, answered in _ROUNDS:
            if message.get(asked) and message.keys() <= {"system", asked, answered}:
                said = ((SYSTEM, "system"), (USER, asked), (ASSISTANT, answered))
                return [
                    Turn(role, text_of(message[key], f"{key!r}"))
                    for role, key in said
                    if not is_absent(message.get(key)) and message[key] != ""
                ]
    return [turn_of(message)]


def text_of(value: Any, what: str) -> str:
    """Return a text; content parts are joined, nothing is the empty text.

    Raises:
        Unusable: an image or another part that is not text, a number.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(part, (Mapping, str)) for part in value):
        return "".join(_part_text(part, what) for part in value)
    raise Unusable("not_text", f"{what} is {kind_name(value)}, expected text")


def parsed_messages(text: str) -> list[Any] | None:
    """Return the messages that a text holds as JSON, None where it holds none.

    Raises:
        Unusable: the text begins as messages do and is not JSON.
    """
    if not _MESSAGES_TEXT.match(text):
        return None
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if extra or not _KNOWN_ROLE.search(text):
            return None  # an answer that shows messages or other JSON
        raise Unusable(
            "not_text",
            "messages are stored as text that is not JSON (as Python or NumPy print them?). Write "
            "them with json.dumps",
        ) from None
    if isinstance(value, str):  # JSON within JSON
        return parsed_messages(value)
    if isinstance(value, Mapping):
        value = [value]
    looks_right = isinstance(value, list) and all(
        isinstance(message, Mapping)
        and any(key in message for key in ROLE_KEYS)
        and any(key in message for key in CONTENT_KEYS)
        for message in value
    )
    return value if looks_right and any(map(_has_known_role, value)) else None


def text_list(value: Any) -> list[str] | None:
    """Return a list of texts, which may be JSON text; None for anything else. Nulls are empty."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value, strict=False)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    return ["" if one is None else one for one in value] if _are_texts(value) else None


def _are_texts(values: list[Any]) -> bool:
    return all(one is None or isinstance(one, str) for one in values)


def same_text(one: str, other: str) -> bool:
    """Return whether two texts differ in white space at most."""
    return one == other or one.split() == other.split()


def _has_known_role(message: Mapping[str, Any]) -> bool:
    role = next((message[key] for key in ROLE_KEYS if key in message), None)
    return isinstance(role, str) and role.strip().lower() in ROLES


def _role(message: Mapping[str, Any], default: str | None) -> str:
    given = next((message[key] for key in ROLE_KEYS if message.get(key)), default)
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        told = f"the role {given!r}" if given is not None else "no role"
        known = "system, user, assistant, tool"
        raise Unusable("unknown_role", f"a turn has {told}, expected one of {known}")
    return role


def _part_text(part: Mapping[str, Any] | str, what: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") or ("text" if "text" in part else None)
    if kind in ("text", "input_text", "output_text"):
        return text_of(part.get("text"), what)
    if isinstance(kind, str) and any(name in kind for name in ("image", "audio", "video")):
        raise Unusable("images", f"{what} has a part of type {kind!r}, expected text")
    raise Unusable("not_text", f"{what} has a part of type {kind!r}, expected text")


def kind_name(value: Any) -> str:
    """Return what a value is, in a user's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "of another type")
