"""The section ``benchmarks`` of a recipe: which benchmarks a run ends with, and against whom."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fpo_core.recipe.base import Count, Settings

BASELINE, REFERENCE = "baseline", "reference"
_POLICY = re.compile(r"policy/[0-9a-f]{16}")


class BenchmarkSettings(Settings):
    """One benchmark that the policy's answers are scored on."""

    pack: Annotated[str, Field(min_length=1)] = Field(
        description="a pack's folder, or the name of one that was pulled (`fpo bench list`)"
    )
    limit: Count | None = Field(
        default=None, description="ask only the first so many questions; default: all"
    )
    against: tuple[str, ...] = Field(
        default=(BASELINE,),
        description="whose answers the policy's are compared with, where a judge compares: "
        "`baseline`, the benchmark's own; `reference`, the model that training started from; "
        "policy/VERSION, another one of this store",
    )

    temperatures: Literal["benchmark", "generation"] = Field(
        default="benchmark",
        description="of the answers: the benchmark's own where its authors fixed them (MT-Bench: "
        "one for each category), else generation.temperatures; `generation`: those in any case",
    )

    @field_validator("against")
    @classmethod
    def _known(cls, against: tuple[str, ...]) -> tuple[str, ...]:
        for name in against:
            if name not in (BASELINE, REFERENCE) and not _POLICY.fullmatch(name):
                raise ValueError(
                    f"{name!r} is none of `baseline`, `reference` and policy/VERSION (16 hex "
                    f"digits, as `fpo store ls` shows them)"
                )
        if len(set(against)) < len(against):
            raise ValueError("an opponent is named twice")
        return against
