"""Load a causal language model and its tokenizer from what a recipe names."""

from pathlib import Path
from typing import Any

from fpo_core.errors import FPOError
from fpo_core.memory import keep_freed_memory
from fpo_core.models import source as sources
from fpo_core.models.gguf import convert_gguf


def model_folder(source: str, revision: str | None = None) -> Path:
    """A local folder with the model's files, fetched or converted when needed.

    Raises:
        FPOError: when the model cannot be had here, with what to do instead.
    """
    if sources.is_package(source):
        return convert_gguf(sources.package_file(source), sources.GGUF_CONVERSION)
    if sources.is_folder(source):
        return sources.folder_with_weights(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=list(sources.MODEL_FILES))
        )
    except Exception as error:
        raise FPOError(
            f"model {source!r} could not be fetched from the hub ({type(error).__name__}). Check "
            f"the name, your access to it (HF_TOKEN) and the network, or point model.source at a "
            f"local folder"
        ) from error


def tokenizer_folder(source: str, revision: str | None = None) -> Path | None:
    """Return a folder with a model's tokenizer, without fetching the weights of one on the hub.

    Args:
        source: as of `model.source`.
        revision: of a model on the hub.

    Returns:
        None where the hub does not answer.
    """
    if sources.is_package(source):
        return model_folder(source)
    if sources.is_folder(source):
        return sources.existing_folder(source)
    from huggingface_hub import snapshot_download

    files = [pattern for pattern in sources.MODEL_FILES if pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))
    except Exception as error:
        if not sources.hub_did_not_answer(error):
            raise
        return None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FPOError(f"model folder {folder.name}: no usable tokenizer ({error})") from error


def load_model(folder: Path, *, dtype: str, attention: str, device: str = "cpu") -> Any:
    """A model in evaluation mode, its parameters frozen.

    Args:
        folder: a Hugging Face model folder.
        dtype: torch dtype by name, such as ``float32``.
        attention: transformers' attention implementation, such as ``sdpa``.
        device: torch device.

    Raises:
        FPOError: weights that cannot be read, an unknown architecture, or an attention that is
            not the model's.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from fpo_core.models.architectures import check_attention
    from fpo_core.models.attention import attention_by_parts

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_attention(config.get_text_config(decoder=True).model_type, attention)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention_by_parts(attention, device),
            local_files_only=True,
            use_safetensors=True,  # only these files are hashed
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise FPOError(f"model folder {folder.name} could not be loaded: {error}") from error
    return model.eval().to(device).requires_grad_(False)


def inference_device() -> str:
    """Where a stage's passes run: the process's first GPU, else the CPU.

    ``CUDA_VISIBLE_DEVICES`` chooses another GPU, or none.
    """
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_cpu(threads: int | None) -> None:
    """Set this process up for tensor work on a CPU.

    Args:
        threads: torch's threads; None leaves its default (the cores).
    """
    import torch

    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
