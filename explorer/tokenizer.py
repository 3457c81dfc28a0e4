"""Where the tokenizer of a cache's model is, of the places that are quick to look in.

No model is fetched or converted for it: without a tokenizer, ids are shown.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from explorer.text import Detokenizer
from fpo_core.errors import FPOError
from fpo_core.models.gguf import converted_folder
from fpo_core.models.source import GGUF_CONVERSION, is_folder, is_package, package_file
from storage.artifact import Artifact
from storage.catalog import list_artifacts
from storage.errors import StoreError
from storage.lineage import input_artifacts
from storage.store import Store

FILE = "tokenizer.json"


def find_detokenizer(store: Store, pairs: Artifact, settings: dict[str, Any]) -> Detokenizer:
    """The tokenizer that made some pairs.

    Args:
        store: a policy in which, trained on these pairs, has it.
        pairs: the pairs.
        settings: of a run's recipe, where its record is kept; names the model.
    """
    source = settings.get("model", {}).get("source")
    folder = model_at_hand(source) if source else None
    if folder is None:
        folder = _of_policy(store, pairs)
    if folder is None:
        named = f"the model {Path(source).name} is not here" if source else "no record names it"
        return Detokenizer(None, f"no tokenizer ({named}): token ids are shown")
    return Detokenizer(folder)


def model_at_hand(source: str) -> Path | None:
    """The folder of a model with a tokenizer, if it is on this machine."""
    with suppress(FPOError, OSError):
        if is_package(source):
            folder = converted_folder(package_file(source), GGUF_CONVERSION)
        elif is_folder(source):
            folder = Path(source).expanduser()
        else:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(source, FILE)
            folder = Path(found).parent if isinstance(found, str) else Path()
        if (folder / FILE).is_file():
            return folder
    return None


def _of_policy(store: Store, pairs: Artifact) -> Path | None:
    for info in list_artifacts(store):
        made_from = input_artifacts(info.inputs or {}).values()
        if info.stage == "policy" and info.state == "complete" and pairs.name in made_from:
            with suppress(StoreError):
                return store.artifact(info.stage, info.version).path(f"model/{FILE}").parent
    return None
