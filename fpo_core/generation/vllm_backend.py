"""Answers by vLLM, which has to be installed beside this project: it brings its own torch.

Written against the interface that vLLM documents (``LLM.generate`` with token ids and a
``SamplingParams`` for each prompt); the project's own tests do not run it.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fpo_core.errors import FPOError
from fpo_core.generation.answers import STOPS, Generated, Prompt, Sampling


class VllmBackend:
    """Answers with a model folder that vLLM loads.

    Args:
        folder: a Hugging Face model folder.
        dtype: torch dtype by name.
        tokenizer: turns answers into text.
        sampling: settings.

    Raises:
        FPOError: vLLM is not installed.
    """

    def __init__(self, folder: Path, dtype: str, tokenizer: Any, sampling: Sampling) -> None:
        check_vllm()
        self._vllm = importlib.import_module("vllm")
        # `vllm`: without the stop tokens and sampling that the folder's generation_config.json
        # adds, so that answers end and are drawn as the settings say, as with transformers.
        self._llm = self._vllm.LLM(
            model=str(folder), dtype=dtype, trust_remote_code=False, generation_config="vllm"
        )
        self._tokenizer, self._sampling = tokenizer, sampling

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Generated]:
        """Answer all prompts; vLLM batches them and gives all answers at the end, in order."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts],
            [self._params(prompt) for prompt in prompts],
            use_tqdm=False,
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
            reason = completion.finish_reason or "unfinished"
            yield Generated(prompt, ids, text, STOPS.get(reason, reason), len(ids))

    def _params(self, prompt: Prompt) -> Any:
        return self._vllm.SamplingParams(
            temperature=prompt.temperature, top_p=self._sampling.top_p, seed=prompt.seed,
            max_tokens=self._sampling.max_new_tokens, stop_token_ids=list(self._sampling.stop),
        )  # fmt: skip


def check_vllm() -> None:
    """Refuse vLLM where it is not installed.

    Raises:
        FPOError: with what to do.
    """
    if importlib.util.find_spec("vllm") is None:
        raise FPOError(
            "backend=vllm needs the package vllm, which is not installed: install it in this "
            "environment (`pip install vllm`, on a machine with a GPU), or take "
            "backend=transformers"
        )
