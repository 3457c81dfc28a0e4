"""The section of a recipe that says how benchmark questions are answered."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from fpo_core.recipe.base import Count, NonNegative, Seed, Settings


class GenerationSettings(Settings):
    """Answers to the questions of benchmarks: by what, and how they are sampled."""

    backend: Literal["transformers", "vllm", "openai"] = Field(
        default="transformers",
        description="what answers: the model in this process, by transformers or vLLM, or an "
        "OpenAI-compatible endpoint that serves one",
    )
    temperatures: tuple[NonNegative, ...] = Field(
        default=(0.7,), min_length=1, description="answers are sampled at each; 0 is greedy"
    )
    samples: Count = Field(
        default=1, description="answers to a question at each temperature; greedy ones: always one"
    )
    max_new_tokens: Count = Field(default=1024, description="longest answer, in tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="sample from the smallest set of likeliest tokens that has this probability",
    )
    seed: Seed = Field(default=0, description="of which each answer's own seed is derived")
    shard_questions: Count = Field(
        default=64, description="questions a shard: what a killed run has to answer again at most"
    )
    base_url: str | None = Field(
        default=None, description="of an endpoint, such as http://127.0.0.1:8000/v1"
    )
    model: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="name of the model at the endpoint"
    )
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None,
        description="environment variable that holds the endpoint's key; default: it takes none",
    )

    @field_validator("temperatures")
    @classmethod
    def _each_once(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        twice = sorted({one for one in temperatures if temperatures.count(one) > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(f'{one:g}' for one in twice)}")
        return temperatures

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give the endpoint's address with http:// or https://")
        if "@" in parts.netloc or parts.query:
            raise ValueError("leave credentials out; key_env names the variable that holds a key")
        return url

    @model_validator(mode="after")
    def _endpoint_is_named(self) -> "GenerationSettings":
        given = {"base_url": self.base_url, "model": self.model, "key_env": self.key_env}
        if self.backend == "openai":
            missing = [name for name in ("base_url", "model") if given[name] is None]
            if missing:
                raise ValueError(f"backend=openai needs {' and '.join(missing)}")
            return self
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"{', '.join(unused)}: for backend=openai alone")
        return self
