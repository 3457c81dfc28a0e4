"""Answers of an OpenAI-compatible endpoint: chat completions, some requests at a time."""

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fpo_core.errors import FPOError
from fpo_core.generation.answers import STOPS, Generated, Prompt, Sampling

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

TIMEOUT_SECONDS = 600.0
RETRIES = 6  # after 429, 5xx and broken connections, with growing waits: about a minute in all


class EndpointBackend:
    """Answers with a model that is served elsewhere, which applies its own chat template.

    Args:
        base_url: of the endpoint.
        model: its name there.
        key_env: environment variable that holds the key; None: no key is sent.
        sampling: settings.
        requests: how many are in flight at most.

    Raises:
        FPOError: the openai package or the key is missing.
    """

    def __init__(
        self, base_url: str, model: str, key_env: str | None, sampling: Sampling, requests: int
    ) -> None:
        check_endpoint(key_env)
        self._url, self._model, self._key_env = base_url, model, key_env
        self._sampling, self._requests = sampling, requests

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Generated]:
        """Answer all prompts, each as soon as it is done.

        Raises:
            FPOError: the endpoint cannot be reached, refuses, or answers with something else.
        """
        # The runner ends what is in flight when this generator is left.
        with asyncio.Runner() as runner:
            answers = self._answers(prompts)

            async def following() -> Generated | None:
                return await anext(answers, None)

            while (answer := runner.run(following())) is not None:
                yield answer

    async def _answers(self, prompts: Sequence[Prompt]) -> AsyncIterator[Generated]:
        from openai import AsyncOpenAI

        key = os.environ[self._key_env] if self._key_env else "none"
        room = asyncio.Semaphore(self._requests)

        async def answered(client: "AsyncOpenAI", prompt: Prompt) -> Generated:
            async with room:
                return await self._answer(client, prompt)

        async with AsyncOpenAI(
            base_url=self._url, api_key=key, timeout=TIMEOUT_SECONDS, max_retries=RETRIES
        ) as client:
            tasks = [asyncio.create_task(answered(client, prompt)) for prompt in prompts]
            try:
                for task in asyncio.as_completed(tasks):
                    yield await task
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, client: "AsyncOpenAI", prompt: Prompt) -> Generated:
        from openai import OpenAIError

        messages: Any = list(prompt.messages)
        try:
            completion = await client.chat.completions.create(
                model=self._model, messages=messages, max_tokens=self._sampling.max_new_tokens,
                temperature=prompt.temperature, top_p=self._sampling.top_p, seed=prompt.seed,
            )  # fmt: skip
        except OpenAIError as error:
            raise self._told(error, prompt) from None  # a cause may hold the request with its key
        return self._generated(completion, prompt)

    def _generated(self, completion: Any, prompt: Prompt) -> Generated:
        # A server may answer with other JSON, of which the package makes whatever it is.
        choices = getattr(completion, "choices", None)
        reason: str = choices[0].finish_reason or "" if choices else ""
        if not choices or choices[0].message is None or not reason:
            raise FPOError(
                f"the endpoint {self._url} answers question {prompt.question_id!r} with something "
                f"that is no chat completion; is base_url right (it often ends in /v1)?"
            )
        text, usage = choices[0].message.content or "", completion.usage
        return Generated(
            prompt, [], text.strip(), STOPS.get(reason, reason),
            usage.completion_tokens if usage else 0,
        )  # fmt: skip

    def _told(self, error: "OpenAIError", prompt: Prompt) -> FPOError:
        """An error in words, without what the endpoint says of a key."""
        import openai

        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            what = f"the key in {self._key_env}" if self._key_env else "requests without a key"
            return FPOError(
                f"the endpoint {self._url} refuses {what} (status {error.status_code}); set "
                f"key_env to the variable that holds a key for the model {self._model!r}"
            )
        if isinstance(error, openai.APITimeoutError):
            return FPOError(
                f"the endpoint {self._url} did not answer question {prompt.question_id!r} within "
                f"{TIMEOUT_SECONDS:.0f} s, {RETRIES + 1} times; run the same command again to go on"
            )
        if isinstance(error, openai.APIConnectionError):
            return FPOError(
                f"the endpoint {self._url} cannot be reached; check base_url and that the server "
                f"runs, then run the same command again to go on"
            )
        if isinstance(error, openai.APIStatusError):
            return FPOError(
                f"the endpoint {self._url} does not answer question {prompt.question_id!r} with "
                f"the model {self._model!r}: status {error.status_code}, {self._hidden(error)}"
            )
        return FPOError(
            f"the endpoint {self._url} answers question {prompt.question_id!r} with something "
            f"that cannot be read ({type(error).__name__})"
        )

    def _hidden(self, error: Exception) -> str:
        """What an error says, shortened, without the key."""
        text = str(error)
        if self._key_env:
            text = text.replace(os.environ[self._key_env], "***")
        return text[:300]


def check_endpoint(key_env: str | None) -> None:
    """Refuse an endpoint that cannot be asked from here, before anything else is done.

    Raises:
        FPOError: the openai package or the key is missing.
    """
    if importlib.util.find_spec("openai") is None:
        raise FPOError(
            "backend=openai needs the package openai, which is not installed: run `pip install "
            "'fpo-pipeline[eval]'` in this environment"
        )
    if key_env is not None and not os.environ.get(key_env):
        raise FPOError(
            f"the environment variable {key_env}, which key_env names, is not set: put the "
            f"endpoint's key into it, or leave key_env out where the endpoint takes none"
        )
