"""The sections of a recipe that say which text is read and how it becomes tokens."""

import datetime as dt
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from fpo_core.recipe.base import Count, Settings

SystemRule = Literal["fold", "drop", "refuse"]
Truncation = Literal["drop", "keep_start", "keep_end"]
Share = Annotated[float, Field(gt=0, le=1)]

# Columns of the `pairs` table; a metadata column of such a name gets the prefix `row_`.
PAIR_COLUMNS = frozenset(
    {
        "pair_id",
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "chosen_unscored",
        "rejected_unscored",
        "split",
        "source",
    }
)
# What a column mapping may name.
FIELDS = ("prompt", "chosen", "rejected", "system", "tools", "history", "messages", "completion")


class Constant(Settings):
    """A fixed text in place of a column."""

    constant: str = Field(description="the text every row gets")


Columns = Mapping[str, str | Constant]


def check_columns(columns: dict[str, str | Constant] | None) -> dict[str, str | Constant] | None:
    """Refuse a mapping of fields that no row has.

    Raises:
        ValueError: naming the field and those that exist.
    """
    unknown = sorted({*(columns or {})} - {*FIELDS})
    if unknown:
        raise ValueError(f"unknown field {', '.join(unknown)}; fields: {', '.join(FIELDS)}")
    return columns


class SourceSettings(Settings):
    """One source of rows; a plain string in the recipe is its path."""

    path: str = Field(
        min_length=1,
        description="file, folder, glob, hub split (OWNER/NAME[@REVISION]:[CONFIG:]SPLIT, with a "
        "slice such as [:10%]), or an s3:// or https:// address",
    )
    weight: Share = Field(
        default=1.0,
        description="share of the source's rows that are used, picked by content; rows keep their "
        "place when others are added",
    )
    limit: Count | None = Field(default=None, description="use at most this many of its rows")
    columns: dict[str, str | Constant] | None = Field(
        default=None, description="column mapping of this source, instead of the section's"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    _known_fields = field_validator("columns")(check_columns)

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        """Write a source that is only a path as its path."""
        return handler(self) if self.options else self.path

    @property
    def options(self) -> dict[str, Any]:
        """Return what the source sets besides its path."""
        columns = self.columns and {
            name: path if isinstance(path, str) else path.model_dump()
            for name, path in self.columns.items()
        }
        given = {
            "weight": None if self.weight == 1 else self.weight,
            "limit": self.limit,
            "columns": columns,
        }
        return {name: value for name, value in given.items() if value is not None}


class HeldoutShare(Settings):
    """Held-out pairs taken out of the training sources."""

    fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        description="share of the prompts; all pairs of a prompt go to one split"
    )


def metadata_column(name: str) -> str:
    """Return the column of `pairs` that keeps a metadata column."""
    return f"row_{name}" if name in PAIR_COLUMNS else name


def _kind_of_heldout(value: Any) -> str:
    return UNION_TAGS[isinstance(value, (Mapping, HeldoutShare))]


Sources = tuple[SourceSettings, ...]
UNION_TAGS = ("<sources>", "<share>")  # no part of a key's path
# pydantic then explains a mistake once, not once per alternative.
Heldout = Annotated[
    Annotated[Sources, Tag(UNION_TAGS[0])] | Annotated[HeldoutShare, Tag(UNION_TAGS[1])],
    Discriminator(_kind_of_heldout),
]


def one_source(value: Any) -> Any:
    """Return a source given alone as a list of one."""
    alone = isinstance(value, str) or (isinstance(value, Mapping) and "path" in value)
    return (value,) if alone else value


def some_source(sources: Sources | HeldoutShare) -> Sources | HeldoutShare:
    """Refuse an empty list of sources.

    Raises:
        ValueError: with what can be given.
    """
    if sources == ():
        raise ValueError(
            "no source. Name a file; held-out pairs can also be a share of the training prompts, "
            "{fraction: 0.05}"
        )
    return sources


class TextSettings(Settings):
    """Reading and cutting text; shared by `data` and `sft`."""

    limit: Count | None = Field(default=None, description="use at most this many examples")
    columns: dict[str, str | Constant] | None = Field(
        default=None,
        description="where a row has its fields: `{prompt: question, chosen: answers.0, system: "
        "{constant: Be brief.}}`; default: found by their names",
    )
    max_length: Count = Field(default=2048, description="longest prompt + response, in tokens")
    max_prompt_length: Count | None = Field(
        default=None, description="longest prompt, in tokens; default: no limit but max_length"
    )
    truncation: Truncation = Field(
        default="drop",
        description="what happens to a prompt that is too long: drop the example, keep the "
        "prompt's start, or keep its end (whole turns first)",
    )
    truncate_answers: bool | Literal["with_end"] = Field(
        default=False,
        description="cut answers that are too long; a cut answer has no end-of-turn token, "
        "`with_end` puts it back",
    )

    _known_fields = field_validator("columns")(check_columns)

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> "TextSettings":
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for an answer in "
                f"max_length={self.max_length}. Lower max_prompt_length or raise max_length"
            )
        return self


class DataSettings(TextSettings):
    """Preference data and how it becomes tokens."""

    train: Sources = Field(
        description="sources of training pairs: paths, or {path, weight, limit, columns}"
    )
    heldout: Heldout = Field(
        description="sources of held-out pairs, or {fraction: 0.05} of the training prompts"
    )
    limit: Count | None = Field(
        default=None, description="use at most this many pairs of each split"
    )
    template: Literal["model", "halos"] = Field(
        default="model",
        description="chat template: the model's own, or the paper's for base models",
    )
    system: SystemRule = Field(
        default="refuse",
        description="when the template takes no system turn: fold it into the first user turn, "
        "drop the row, or refuse to run",
    )
    date: str | None = Field(
        default=None,
        description="the date (YYYY-MM-DD) that a template which writes one gets; default: the day "
        "this data was first tokenized into the store",
    )
    pairs_per_prompt: Count = Field(
        default=1,
        description="pairs made from a row that ranks more than two answers, widest gap first",
    )
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05,
        description="largest share of rows that may be unusable for one reason; one row never "
        "stops a run unless this is 0",
    )
    metadata: tuple[str, ...] = Field(
        default=(),
        description="columns kept with each pair, by which results are broken down; a name that "
        "`pairs` has itself (such as `source`) is stored as `row_source`",
    )
    shard_pairs: Count = Field(default=512, description="pairs per shard")

    @field_validator("date")
    @classmethod
    def _is_a_date(cls, date: str | None) -> str | None:
        if date is not None:
            try:
                dt.date.fromisoformat(date)
            except ValueError as error:
                raise ValueError("expected a date as YYYY-MM-DD") from error
        return date

    @field_validator("date", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, date: Any) -> Any:
        return date.isoformat() if isinstance(date, dt.date) else date

    @field_validator("metadata")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len({*names}) < len(names):
            raise ValueError("a name occurs twice")
        return names

    _one_source = field_validator("train", "heldout", mode="before")(one_source)
    _not_empty = field_validator("train", "heldout")(some_source)

    @property
    def heldout_sources(self) -> Sources:
        """Return the sources that held-out pairs are read from."""
        return self.train if isinstance(self.heldout, HeldoutShare) else self.heldout
