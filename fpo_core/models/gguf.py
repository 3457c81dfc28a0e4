"""Convert a GGUF model to a Hugging Face folder, once.

Reading GGUF takes transformers some twenty seconds, safetensors a tenth of one. transformers
refuses to save a model that it loaded from GGUF (it still counts as quantized), so the weights
move into a fresh model of the same configuration, and both must give identical logits.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fpo_core.files import follow_umask
from fpo_core.models.source import cache_folder, file_digest

log = logging.getLogger("fpo.models")


def convert_gguf(path: Path, version: int) -> Path:
    """The safetensors folder of a GGUF file, converted on first use.

    Args:
        path: the GGUF file.
        version: the conversion's version, part of the folder's name.

    Returns:
        A folder that ``from_pretrained`` reads. It appears whole or not at all.
    """
    target = converted_folder(path, version)
    if target.is_dir():
        return target
    log.info("converting %s to safetensors (once, about half a minute)", path.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        _convert(path, scratch)
        follow_umask(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # another process finished first: its folder is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def converted_folder(path: Path, version: int) -> Path:
    """Where the conversion of a GGUF file is, or will be."""
    return cache_folder() / "models" / f"{path.stem}-{file_digest(path)[:12]}-v{version}"


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    config: Any = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    ids = torch.tensor([tokenizer("The capital of France is Paris.")["input_ids"]])
    reloaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
        same = torch.equal(source(ids).logits, reloaded(ids).logits)
    assert same, f"the converted copy of {path.name} does not give the original's logits"
