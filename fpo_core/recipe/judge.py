"""The section ``judge`` of a recipe: which endpoint judges, and how it is asked.

Nothing in it is secret: the key stays in the environment, and what could hold one by mistake is
refused without being repeated.
"""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from fpo_core.recipe.base import Count, NonNegative, Positive, Settings

# Upper case, so that a key that was pasted here is told from the name of a variable.
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


class JudgePrice(Settings):
    """What a judge's tokens cost."""

    prompt: NonNegative = Field(description="USD a million prompt tokens")
    reply: NonNegative = Field(description="USD a million reply tokens")


class JudgeSettings(Settings):
    """A model behind an OpenAI-compatible endpoint that judges answers.

    Only ``model`` and ``revision`` change a verdict and are part of its key.
    """

    model: Annotated[str, Field(min_length=1)] = Field(description="as the endpoint names it")
    revision: str | None = Field(
        default=None,
        description="of the judge (a date, a commit); endpoints move their models, and verdicts "
        "of different revisions are never mixed",
    )
    base_url: str = Field(
        default="https://api.openai.com/v1",
        description="address of the endpoint, up to what `/chat/completions` follows",
    )
    key_env: str | None = Field(
        default="OPENAI_API_KEY",
        description="name of the environment variable with the key; null: no key is needed",
    )
    concurrency: Count = Field(default=8, description="requests in flight at a time")
    requests_per_minute: Count | None = Field(
        default=None, description="most requests a minute, retries included; default: no limit"
    )
    timeout_seconds: Positive = Field(
        default=120, description="longest silence of the endpoint before a request is tried again"
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        default=5,
        description="of a request that was refused for now (429), failed (5xx), broke off, or got "
        "an answer that cannot be read",
    )
    price: JudgePrice | None = Field(default=None, description="for the estimate of the cost")

    @property
    def identity(self) -> dict[str, str | None]:
        """What of the judge changes a verdict."""
        return {"model": self.model, "revision": self.revision}

    @property
    def host(self) -> str:
        """Host and port of the endpoint, as messages name it."""
        return urlsplit(self.base_url).netloc

    # After the fields: a field's own error would repeat what was given.
    @model_validator(mode="after")
    def _no_key_in_it(self) -> "JudgeSettings":
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            raise ValueError(
                "judge.key_env is the name of an environment variable, such as OPENAI_API_KEY (A "
                "to Z, digits, _), never the key itself; null where the endpoint needs none"
            )
        try:
            parts = urlsplit(self.base_url)
            _ = parts.port  # raises where it is no number
        except ValueError:
            parts = urlsplit("")
        if parts.username or parts.password or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "judge.base_url holds a user, password, query or fragment; a key belongs in the "
                "environment variable that judge.key_env names"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "judge.base_url is no http:// or https:// address, such as https://host:8000/v1"
            )
        return self
