"""Batches of examples, read ahead of the training that takes them.

One thread reads the shards that the next batches need and drops those that none needs any more;
another reads every shard once at the start, so that a cache that disagrees ends the run in its
first minutes and not in its third day.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from fpo_core.recipe.training import OptimizerSettings
from fpo_core.training.examples import AlignedShards, Example
from fpo_core.training.order import batches_of, groups, num_steps

AHEAD = 4  # batches that are ready before they are asked for
POLL_SECONDS = 0.05

Batch = tuple[int, list[Example]]  # its step, from 1


class ExampleStream:
    """The global batches of a run, in order; a context manager, since it has threads.

    Args:
        shards: pairs and caches.
        settings: batch size, epochs, order.
        check: raises for examples that the model cannot take; called with each shard's.
        part: (rank, ranks): this process checks its share of the shards.

    Attributes:
        steps: optimizer steps of the run.
    """

    def __init__(
        self,
        shards: AlignedShards,
        settings: OptimizerSettings,
        check: Callable[[Sequence[Example]], None],
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._shards, self._settings, self._check, self._part = shards, settings, check, part
        self._counts = shards.counts()
        self.steps = num_steps(sum(self._counts), settings.batch_size, settings.epochs)
        self._held: OrderedDict[int, list[Example]] = OrderedDict()
        self._ready: queue.Queue[Batch] = queue.Queue(AHEAD)
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="examples")

    def __enter__(self) -> "ExampleStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._threads.shutdown(wait=True)

    def batches(self, done: int = 0) -> Iterator[Batch]:
        """Step number and global batch, of every step after the first ``done``.

        Raises:
            FPOError: a shard that is found wrong, whether it is due yet or not.
        """
        reading = self._threads.submit(self._read_ahead, done)
        checking = self._threads.submit(self._check_all)
        for _ in range(done, self.steps):
            yield self._next(reading, checking)

    def _next(self, reading: Future[None], checking: Future[None]) -> Batch:
        while True:
            is_over = reading.done()  # asked first: after it nothing comes into the queue
            for work in (reading, checking):
                if work.done():
                    work.result()  # raises what ended it
            try:
                return self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                assert not is_over, "fewer batches than steps"

    def _read_ahead(self, done: int) -> None:
        for batch in self._in_order(done):
            while not self._over.is_set():
                try:
                    self._ready.put(batch, timeout=POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if self._over.is_set():
                return

    def _in_order(self, done: int) -> Iterator[Batch]:
        size = self._settings.batch_size
        for group in groups(self._counts, self._settings):
            if group.first_step - 1 + num_steps(len(group.rows), size, 1) <= done:
                continue
            examples = [self._shard(shard)[row] for shard, row in group.rows]
            lengths = [example.ids.length for example in examples]
            for number, places in enumerate(batches_of(group, lengths, size)):
                if group.first_step + number > done:
                    yield group.first_step + number, [examples[place] for place in places]

    def _shard(self, number: int) -> list[Example]:
        """A shard's examples; those of the two windows that were last in use are kept."""
        if number not in self._held:
            self._held[number] = self._checked(number)
            while len(self._held) > 2 * self._settings.window_shards:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]

    def _check_all(self) -> None:
        rank, ranks = self._part
        for number in range(rank, len(self._shards), ranks):
            if self._over.is_set():
                return
            self._checked(number)

    def _checked(self, number: int) -> list[Example]:
        examples = self._shards.read(number)
        self._check(examples)
        return examples
