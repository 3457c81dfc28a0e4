"""The chat template of a model, read without loading its tokenizer.

A template that writes the day's date has to be known before anything runs: the date is part of
the version of what it renders.
"""

from pathlib import Path
from typing import Any

from fpo_core.files import read_json_object
from fpo_core.models.source import (
    cache_folder,
    existing_folder,
    file_digest,
    hub_did_not_answer,
    is_folder,
    is_package,
    package_file,
)

# transformers reads the first that exists.
_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_KEY = "tokenizer.chat_template"  # of a GGUF file


def chat_template_of(source: str, revision: str | None = None) -> str | None:
    """Return a model's chat template, None where it has none or the hub does not answer.

    Args:
        source: as of `model.source`.
        revision: of a model on the hub.
    """
    if is_package(source):
        return _of_gguf(package_file(source))
    if is_folder(source):
        folder = existing_folder(source)
        return _first(folder / name for name in _FILES)
    return _first(_hub_file(source, name, revision) for name in _FILES)


def writes_date(template: str | None) -> bool:
    """Return whether a chat template writes the date of the day it is rendered."""
    return template is not None and "strftime_now" in template


def _first(files: Any) -> str | None:
    for path in files:
        if path is not None and path.is_file():
            template = _of_file(path)
            if template:
                return template
    return None


def _of_file(path: Path) -> str | None:
    if path.suffix == ".jinja":
        return path.read_text(encoding="utf-8")
    template = read_json_object(path, "model").get("chat_template")
    if isinstance(template, list):  # several by name
        template = "".join(entry["template"] for entry in template)
    return template


def _of_gguf(path: Path) -> str | None:
    """Read the template out of a GGUF file; remembered, since parsing one takes a second."""
    memo = cache_folder() / "templates" / f"{file_digest(path)[:32]}.jinja"
    if memo.is_file():
        return memo.read_text(encoding="utf-8") or None
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get(_KEY)
    template = "" if field is None else str(field.contents())
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(template, encoding="utf-8")
    except OSError:
        pass  # only a memo
    return template or None


def _hub_file(source: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    cached = try_to_load_from_cache(source, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # known not to exist
        return None
    try:
        return Path(hf_hub_download(source, name, revision=revision, etag_timeout=5))
    except EntryNotFoundError:
        return None
    except Exception as error:
        if not hub_did_not_answer(error):
            raise
        return None
