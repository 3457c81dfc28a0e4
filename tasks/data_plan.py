"""The data settings of a recipe: what decides a stage's version, and the rules for bad rows."""

import datetime as dt
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fpo_core.data.render import ChatFormat
from fpo_core.data.sources.identity import Resolved, identify_data
from fpo_core.data.tokenization import Rules
from fpo_core.data.truncation import Limits
from fpo_core.models.chat_template import chat_template_of, writes_date
from fpo_core.models.load import load_tokenizer, tokenizer_folder
from fpo_core.recipe import Recipe
from fpo_core.recipe.data import HeldoutShare, SourceSettings, TextSettings
from fpo_core.recipe.training import SftSettings
from storage.store import Store

# Settings that came later than the first versions: at their default they leave a version alone.
_TEXT_KEYS = frozenset({"columns", "truncation", "truncate_answers"})


class TemplateDate(NamedTuple):
    """The date that a chat template writes, where it writes one."""

    date: str
    data: str  # identity of the data whose first tokenization it is recorded under
    is_recorded: bool  # in the store, or set in the recipe


def template_date(recipe: Recipe, store: Store, data: str) -> TemplateDate | None:
    """Find the date for a template that writes one: the recipe's, or the first tokenization's."""
    if recipe.data.template != "model":
        return None
    template = chat_template_of(recipe.model.source, recipe.model.revision)
    if not writes_date(template):
        return None
    if recipe.data.date:
        return TemplateDate(recipe.data.date, data, is_recorded=True)
    recorded = store.first_date(data)
    today = dt.datetime.now(dt.UTC).date().isoformat()
    return TemplateDate(recorded or today, data, is_recorded=recorded is not None)


class DataSources:
    """Identify data sources; gather the files of resolved ones and the names of the others."""

    def __init__(self, unresolved: list[str]) -> None:
        self.unresolved = unresolved
        self.resolved: dict[str, Resolved] = {}

    def digest(self, sources: Iterable[str]) -> str:
        """One digest over the content of sources, in their order."""
        values = []
        for source in sources:
            found = identify_data(source)
            values.append(found.value)
            if not found.resolved:
                self.unresolved.append(f"data {source}")
            if found.files:
                self.resolved[source] = found.files
        return digest_of(values)


def tokenize_part(recipe: Recipe) -> dict[str, Any]:
    """Name the settings that decide how pairs are tokenized."""
    data = recipe.data
    keys = {"limit", "template", "max_length", "max_prompt_length", "shard_pairs"}
    part = data.model_dump(include=keys)
    part |= _set_apart(data, {*_TEXT_KEYS, "system", "pairs_per_prompt", "metadata"})
    if isinstance(data.heldout, HeldoutShare):
        part["heldout_fraction"] = data.heldout.fraction
        return part | _source_options({"train": data.train})
    return part | _source_options({"train": data.train, "heldout": data.heldout})


def instructions_part(recipe: Recipe, settings: SftSettings) -> dict[str, Any]:
    """Name the settings that decide how a warm start's instructions are tokenized."""
    part = settings.model_dump(include={"limit", "turns", "max_length", "max_prompt_length"})
    part |= recipe.data.model_dump(include={"template", "shard_pairs"})
    part |= {**_set_apart(settings, _TEXT_KEYS), **_set_apart(recipe.data, {"system"})}
    return part | _source_options({"data": settings.data})


def sae_text_part(
    recipe: Recipe, commit: str | None, dated: Mapping[str, str], unresolved: list[str]
) -> dict[str, Any]:
    """Name the settings that decide the windows an SAE is trained on; none for a stored SAE.

    Args:
        recipe: the recipe.
        commit: of a model on the hub.
        dated: the date that the template writes, where it writes one.
        unresolved: receives the model where its tokenizer cannot be had.

    Raises:
        FPOError: the recipe's chat template does not fit the model.
    """
    if recipe.sae.train is None:
        return {}
    part: dict[str, Any] = {"kinds": [source.kind for source in recipe.sae.train.text]}
    if any(kind != "text" for kind in part["kinds"]):
        part |= {**_set_apart(recipe.data, {"template", "system"}), **dated}
    source = recipe.model.source
    folder = tokenizer_folder(source, commit or recipe.model.revision)
    if folder is None:
        if f"model {source}" not in unresolved:
            unresolved.append(f"model {source}")
        return part
    bos = ChatFormat(load_tokenizer(folder), recipe.data.template).bos
    # Windows without BOS are those of the first versions.
    return {**part, "bos": list(bos)} if bos else part


def _set_apart(settings: TextSettings, keys: Collection[str]) -> dict[str, Any]:
    """The settings among some that differ from their default."""
    return settings.model_dump(mode="json", include=set(keys), exclude_defaults=True)


def _source_options(sources: Mapping[str, Sequence[SourceSettings]]) -> dict[str, Any]:
    """What sources set besides their paths, by the recipe's key; nothing where they set nothing."""
    options = {name: [source.options for source in given] for name, given in sources.items()}
    return {f"{name}_options": found for name, found in options.items() if any(found)}


def digest_of(values: list[str]) -> str:
    """Digest texts, in their order."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def rules_of(recipe: Recipe, settings: TextSettings, section: str) -> Rules:
    """Return what a recipe says about rows that do not fit, in `data` or `sft`."""
    limits = Limits(
        max_prompt_length=settings.max_prompt_length,
        max_length=settings.max_length,
        section=section,
        truncation=settings.truncation,
        truncate_answers=settings.truncate_answers,
    )
    return Rules(
        limits=limits,
        system=recipe.data.system,
        max_bad_share=recipe.data.max_bad_share,
        limit=settings.limit,
    )
