"""Ask a judge many questions: a fixed number in flight, each answer kept as soon as it is there.

Workers take the next request whenever they have finished one, so that a slow answer holds up
nothing but itself. A run that is killed loses the answers in flight and asks no other twice.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from fpo_core.bench.model import JudgeRequest, Reply
from fpo_core.errors import FPOError
from fpo_core.judge.cache import Answer, JudgmentCache, make_entry, read_entry, request_digest
from fpo_core.judge.endpoint import (
    NotAnswered,
    check_judge,
    connect,
    declined_setting,
    explained,
    read_key,
)
from fpo_core.judge.wire import DECLINABLE, BadAnswer, Withheld, read_answer, request_body
from fpo_core.progress import not_shown
from fpo_core.recipe.judge import JudgeSettings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger("fpo.stage")

# So many failures with no answer in between are the endpoint's: going on is pointless.
MOST_IN_A_ROW = 10
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before an unreadable answer is asked for again


class Counts(NamedTuple):
    """What became of the requests; ``asked`` is the sum of the next three."""

    asked: int
    cached: int  # answered by an earlier run
    answered: int
    failed: int
    prompt_tokens: int  # of this run's answers, as the endpoint counts them
    reply_tokens: int


class Judged(NamedTuple):
    """The outcome of asking, by request key."""

    replies: dict[str, Reply]
    failures: dict[str, str]  # the reason
    counts: Counts
    refused: frozenset[str] = frozenset()  # failures that asking again would not mend
    declined: frozenset[str] = frozenset()  # settings that the judge did not take


class Judge:
    """A judge to ask.

    Args:
        settings: which one, and how.
        cache: of what it has answered.
    """

    def __init__(self, settings: JudgeSettings, cache: JudgmentCache) -> None:
        self.settings, self.cache = settings, cache

    def ask(
        self, requests: Sequence[JudgeRequest], on_reply: Callable[[int], None] = not_shown
    ) -> Judged:
        """Have every request answered, from the cache where it can be.

        Args:
            requests: with keys of their own; equal contents are asked once.
            on_reply: told how many requests are settled by what just came, the cached ones at
                first, those that failed too.

        Raises:
            FPOError: going on is pointless: the endpoint cannot be reached, refuses the key, does
                not know the model, or fails again and again. What was answered is in the cache.
        """
        asking = _Asking(self.settings, self.cache, on_reply)
        waiting = asking.settle_cached(by_content(self.settings, requests, asking.fail))
        if waiting:
            check_judge(self.settings)
            asyncio.run(asking.ask(waiting))
        return asking.outcome()


def by_content(
    settings: JudgeSettings,
    requests: Sequence[JudgeRequest],
    on_bad: Callable[[Sequence[JudgeRequest], str], None],
) -> dict[str, list[JudgeRequest]]:
    """The requests by digest, in their order; those with the same have equal contents.

    Args:
        settings: the judge.
        requests: what it is to be asked.
        on_bad: told of requests that cannot be sent, and why.
    """
    assert len({request.key for request in requests}) == len(requests)
    found: dict[str, list[JudgeRequest]] = {}
    for request in requests:
        try:
            found.setdefault(request_digest(settings, request), []).append(request)
        except UnicodeEncodeError:  # half of a surrogate pair
            on_bad([request], "its text is not valid Unicode")
    return found


class _Asking:
    """The state of one ``ask``."""

    def __init__(
        self, settings: JudgeSettings, cache: JudgmentCache, on_reply: Callable[[int], None]
    ) -> None:
        self._settings, self._cache, self._on_reply = settings, cache, on_reply
        self._key: str | None = None
        self._replies: dict[str, Reply] = {}
        self._failures: dict[str, str] = {}
        self._refused: set[str] = set()
        self._damaged: set[str] = set()
        self._declined: set[str] = set()  # found out while asking
        self._answered_without: set[str] = set()  # of the answers, cached ones too
        self._cached = self._prompt_tokens = self._reply_tokens = 0
        self._answers = self._in_a_row = 0
        self._without_logprobs = False

    def settle_cached(
        self, requests: Mapping[str, list[JudgeRequest]]
    ) -> dict[str, list[JudgeRequest]]:
        """Take what the cache has; returns what is left."""
        entries = self._cache.get_all(requests)
        for digest, entry in entries.items():
            answer = read_entry(digest, entry)
            if answer is None:
                self._damaged.add(digest)
            else:
                self._cached += len(requests[digest])
                self._settle(requests[digest], answer)
        if self._damaged:
            log.warning("judge      %d damaged judgments are asked again", len(self._damaged))
        done = self._replies
        return {digest: same for digest, same in requests.items() if same[0].key not in done}

    async def ask(self, requests: Mapping[str, list[JudgeRequest]]) -> None:
        """Ask all of them, ``concurrency`` at a time."""
        self._key = read_key(self._settings)
        waiting = iter(requests.items())
        most = min(self._settings.concurrency, len(requests))
        with ThreadPoolExecutor(most) as writers:  # its end waits for what is being written
            async with connect(self._settings, self._key) as client:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(most):
                            group.create_task(self._work(client, group, writers, waiting))
                except BaseExceptionGroup as errors:
                    first = errors.exceptions[0]
                else:
                    return
        raise first

    async def _work(
        self,
        client: "AsyncOpenAI",
        group: asyncio.TaskGroup,
        writers: ThreadPoolExecutor,
        waiting: Iterator[tuple[str, list[JudgeRequest]]],
    ) -> None:
        loop, keeping = asyncio.get_running_loop(), None
        for digest, same in waiting:
            try:
                answer = await self._answer(client, same[0])
            except NotAnswered as error:
                self.fail(same, str(error), own_fault=error.own_fault)
                self._stop_if_pointless(error)
                continue
            self._answers, self._in_a_row = self._answers + 1, 0
            self._prompt_tokens += answer.reply.prompt_tokens or 0
            self._reply_tokens += answer.reply.reply_tokens or 0
            self._warn_of_missing_logprobs(same[0], answer.reply)
            kept = loop.run_in_executor(writers, self._keep, digest, same[0], answer)
            if keeping is not None:
                await keeping  # a store that is slower than the endpoint holds it up
            # The next request does not wait for the store.
            keeping = group.create_task(self._settle_kept(same, kept))

    async def _settle_kept(
        self, same: Sequence[JudgeRequest], kept: "asyncio.Future[Answer]"
    ) -> None:
        answer = await asyncio.shield(kept)  # Ctrl-C cancels the wait, not the writing
        self._settle(same, answer)

    async def _answer(self, client: "AsyncOpenAI", request: JudgeRequest) -> Answer:
        """One answer that can be read.

        Raises:
            NotAnswered: there is none for this request.
            FPOError: there will be none for any.
        """
        reason, pause = "", FIRST_PAUSE
        for tried in range(self._settings.retries + 1):
            if tried:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            body, declined = await self._body(client, request)
            try:
                return read_answer(body).model_copy(update={"declined": declined})
            except BadAnswer as error:
                reason = str(error)
            except Withheld as error:
                raise NotAnswered(str(error), own_fault=True) from None
        raise NotAnswered(reason)

    async def _body(
        self, client: "AsyncOpenAI", request: JudgeRequest
    ) -> tuple[bytes, tuple[str, ...]]:
        """An answer's body, and the settings that it was asked for without."""
        from openai import APIError

        create = client.chat.completions.with_raw_response.create
        while True:  # once more for each setting that is declined, and there are two
            declined = tuple(sorted(self._declined))
            try:
                answer = await create(**request_body(self._settings.model, request, declined))
            except APIError as error:
                setting = declined_setting(error)
                told = explained(error, self._settings, self._key)
            else:
                return answer.http_response.content, declined
            if setting is None or setting in declined:
                raise told  # out here, so that no traceback shows the endpoint's words
            self._decline(setting)

    def _decline(self, setting: str) -> None:
        if setting not in self._declined:
            log.warning(
                "judge      %s does not take %s; sent instead: %s",
                self._settings.model, setting, DECLINABLE[setting],
            )  # fmt: skip
        self._declined.add(setting)

    def _keep(self, digest: str, request: JudgeRequest, answer: Answer) -> Answer:
        """Put an answer into the cache; returns the one that is there now."""
        entry = make_entry(self._settings, request, answer)
        if digest not in self._damaged:
            there = read_entry(digest, self._cache.put(digest, entry))
            if there is not None:
                return there
        self._cache.mend(digest, entry)
        return answer

    def _settle(self, same: Sequence[JudgeRequest], answer: Answer) -> None:
        self._answered_without |= set(answer.declined)
        for request in same:
            self._replies[request.key] = answer.reply
        self._on_reply(len(same))

    def fail(self, same: Sequence[JudgeRequest], reason: str, *, own_fault: bool = True) -> None:
        """Note requests as failed.

        Args:
            same: the requests.
            reason: for the user.
            own_fault: asking the same again would fail again.
        """
        for request in same:
            self._failures[request.key] = reason
            if own_fault:
                self._refused.add(request.key)
        self._on_reply(len(same))

    def _stop_if_pointless(self, error: NotAnswered) -> None:
        # A run that goes on with what is left may have nothing but such requests before it.
        if error.own_fault and (self._answers or self._cached):
            return
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            first = "" if self._answers else "the first "
            raise FPOError(
                f"{first}{MOST_IN_A_ROW} requests in a row to the judge {self._settings.model} at "
                f"{self._settings.host} got no answer, the last: {error}. What was answered is "
                f"kept: mend the cause, and the same command goes on from there"
            ) from None

    def _warn_of_missing_logprobs(self, request: JudgeRequest, reply: Reply) -> None:
        if not request.top_logprobs or reply.top_logprobs or self._without_logprobs:
            return
        self._without_logprobs = True
        log.warning(
            "judge      %s gives no log-probs, which were asked for; verdicts that are read from "
            "them will be missing (transformers serve has none, OpenAI and vLLM have them)",
            self._settings.host,
        )

    def outcome(self) -> Judged:
        """What came of it."""
        replies, failures = self._replies, self._failures
        asked = len(replies) + len(failures)
        if failures:
            key, reason = next(iter(failures.items()))
            log.warning(
                "judge      %d of %d requests got no answer; the first, %s: %s",
                len(failures), asked, key, reason,
            )  # fmt: skip
        counts = Counts(
            asked, self._cached, len(replies) - self._cached, len(failures),
            self._prompt_tokens, self._reply_tokens,
        )  # fmt: skip
        return Judged(
            replies, failures, counts, frozenset(self._refused), frozenset(self._answered_without)
        )
