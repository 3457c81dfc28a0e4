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
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
# Parts of a turn that templates render; everything else of a message is provenance.
EXTRA_KEYS = (
    "tool_calls",
    "reasoning_content",
    "reasoning",
    "thinking",
    "name",
    "tool_call_id",
    "function_call",
)
MESSAGE_KEYS = frozenset({*ROLE_KEYS, *CONTENT_KEYS, *EXTRA_KEYS, "weight"})
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
_PLAIN_KEYS = {"role", "content"}
_MESSAGES_KEYS = ("messages", "conversations", "conversation", "turns")
_JSON_LIST = re.compile(r"\s*\[\s*\{")


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
    if not isinstance(message, Mapping):
        raise Unusable("not_text", f"a turn is {_kind(message)}, expected role and content")
    if message.keys() == _PLAIN_KEYS:  # most messages of most files
        role, content = message["role"], message["content"]
        if type(role) is type(content) is str and role in ROLES:
            return Turn(ROLES[role], content)
    media = next((key for key in MEDIA_KEYS if not is_absent(message.get(key))), None)
    if media:
        raise Unusable("images", f"a turn has {media!r}, this pipeline reads text only")
    role = _role(message, default_role)
    extra = tuple(
        (key, message[key])
        for key in EXTRA_KEYS
        if not is_absent(message.get(key)) and message[key] != ""
    )
    content = next(
        (message[key] for key in CONTENT_KEYS if message.get(key) is not None),
        None,
    )
    return Turn(
        role=role,
        content=text_of(content, f"the {role} turn's content"),
        extra=extra,
        is_learnt=message.get("weight") != 0,
    )


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
        raise Unusable("not_text", f"{what} is {_kind(messages)}, expected a list of messages")
    return [turn_of(message) for message in messages]


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
    raise Unusable("not_text", f"{what} is {_kind(value)}, expected text")


def parsed_messages(text: str) -> list[Any] | None:
    """Return the messages that a text holds as JSON, None where it holds none."""
    if not _JSON_LIST.match(text):
        return None
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    looks_right = all(
        isinstance(message, Mapping)
        and any(key in message for key in ROLE_KEYS)
        and any(key in message for key in CONTENT_KEYS)
        for message in value
    )
    return value if looks_right else None


def same_text(one: str, other: str) -> bool:
    """Return whether two texts differ in white space at most."""
    return one == other or one.split() == other.split()


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
    raise Unusable("images", f"{what} has a part of type {kind!r}, this pipeline reads text only")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a bool"}
    return names.get(type(value), type(value).__name__)
