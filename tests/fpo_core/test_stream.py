"""The order of training and the reader behind it: every row once an epoch, resumable, bounded."""

import time
import weakref
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.data.batches import PairIds, check_vocabulary
from fpo_core.errors import FPOError
from fpo_core.recipe.training import SftSettings
from fpo_core.training.examples import AlignedShards, Example
from fpo_core.training.stream import ExampleStream


class Shard(list):
    """A shard's examples, which a weak reference can follow."""


class Made:
    """Aligned shards of made-up examples, which counts what is read and what is still held."""

    def __init__(self, counts: list[int]) -> None:
        self._counts, self.reads = counts, [0] * len(counts)
        self._alive: list[weakref.ref] = []
        self.most_alive = 0

    def __len__(self) -> int:
        return len(self._counts)

    def counts(self) -> list[int]:
        return self._counts

    def read(self, number: int) -> Shard:
        self.reads[number] += 1
        random = np.random.default_rng(number)
        sizes = random.integers(1, 200, self._counts[number])
        shard = Shard(
            Example(PairIds(f"{number}-{row}", [1], [2] * int(size), [3]), (0.0, 0.0), ())
            for row, size in enumerate(sizes)
        )
        self._alive.append(weakref.ref(shard))
        self.most_alive = max(self.most_alive, sum(one() is not None for one in self._alive))
        return shard


def order(**values: Any) -> SftSettings:
    return SftSettings(data=("x",), **values)


def trained(shards: Any, options: SftSettings, done: int = 0) -> list[tuple[int, list[str]]]:
    with ExampleStream(shards, options, lambda _: None) as stream:
        return [(step, [e.ids.pair_id for e in batch]) for step, batch in stream.batches(done)]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    batch=st.integers(1, 6), bucket=st.integers(1, 4), window=st.integers(1, 8),
    epochs=st.integers(1, 3), seed=st.integers(0, 5), data=st.data(),
)  # fmt: skip
def test_every_row_once_an_epoch_and_resumed_as_if_never_stopped(
    counts, batch, bucket, window, epochs, seed, data
):
    options = order(batch_size=batch, bucket_batches=bucket, window_shards=window, epochs=epochs,
                    seed=seed)  # fmt: skip
    every = trained(Made(counts), options)
    steps = -(-sum(counts) // batch)
    assert [step for step, _ in every] == list(range(1, epochs * steps + 1))
    rows = sorted(f"{shard}-{row}" for shard, n in enumerate(counts) for row in range(n))
    for epoch in range(epochs):
        batches = [names for _, names in every[epoch * steps : (epoch + 1) * steps]]
        assert sorted(sum(batches, [])) == rows
        assert all(len(names) == batch for names in batches[:-1])
    done = data.draw(st.integers(0, len(every)))
    assert trained(Made(counts), options, done) == every[done:]


def test_a_small_set_in_batches_at_random_is_numpys_permutation():
    found = trained(Made([4, 6]), order(batch_size=10, bucket_batches=1, epochs=2, seed=3))
    names = [*(f"0-{row}" for row in range(4)), *(f"1-{row}" for row in range(6))]
    for epoch, (_, batch) in enumerate(found):
        permutation = np.random.default_rng([3, epoch]).permutation(10)
        assert batch == [names[row] for row in permutation]


def padding(buckets: int) -> float:
    """Share of padding in batches of 8."""
    shards, padded, real = Made([64] * 4), 0, 0
    with ExampleStream(
        shards, order(batch_size=8, bucket_batches=buckets), lambda _: None
    ) as stream:  # fmt: skip
        for _, batch in stream.batches():
            lengths = [example.ids.length for example in batch]
            padded, real = padded + 8 * max(lengths), real + sum(lengths)
    return 1 - real / padded


def test_batches_alike_in_length_are_padded_less():
    assert padding(1) > 0.35
    assert padding(8) < 0.12


def test_lengths_are_not_trained_in_order():
    """Sorted batches would train all long pairs first."""
    shards = Made([64] * 4)
    with ExampleStream(shards, order(batch_size=8), lambda _: None) as stream:
        longest = [max(e.ids.length for e in batch) for _, batch in stream.batches()]
    for group in (longest[i : i + 8] for i in range(0, 32, 8)):
        assert group != sorted(group, reverse=True)


def test_memory_follows_the_window_and_not_the_data():
    for shards in (20, 60):
        made = Made([16] * shards)
        options = order(batch_size=8, bucket_batches=2, window_shards=3, epochs=2)
        trained(made, options)
        assert made.most_alive <= 2 * 3 + 3  # one that comes in, one that is checked, one's batches
        assert max(made.reads) <= 2 + 1  # once an epoch, and once to check


def test_what_ends_the_reading_while_a_batch_is_awaited_is_raised():
    """And not that a batch is missing."""

    class Unreadable(Made):
        def read(self, number: int) -> Shard:
            time.sleep(0.02)  # by now the training waits for its first batch
            raise FPOError(f"shard {number} cannot be read")

    for _ in range(10):
        with pytest.raises(FPOError, match="shard 0 cannot be read"):
            trained(Unreadable([4]), order(batch_size=2))


def write_shards(folder, count):
    for number in range(count):
        rows = [{"pair_id": f"{number}-{row}", "prompt_ids": [1, 2], "chosen_ids": [3],
                 "rejected_ids": [4], "split": "train"} for row in range(8)]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")
    return [folder / f"{number}.parquet" for number in range(count)]


def test_the_first_examples_take_their_own_shards_only(tmp_path):
    """The others are damaged, but for the column that says the split."""
    splits = ["train", "train", "heldout"], ["heldout", "heldout"], ["train"], ["heldout"]
    files = [tmp_path / f"{number}.parquet" for number in range(len(splits))]
    for file, split in zip(files, splits, strict=True):
        pq.write_table(pa.table({"split": split}), file)
    for number in (0, 1):
        rows = [{"pair_id": f"{number}-{row}", "prompt_ids": [1], "chosen_ids": [2],
                 "rejected_ids": [3], "split": split}
                for row, split in enumerate(splits[number])]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), files[number])
    shards = AlignedShards(files, (), (), 1, "heldout")
    for count in (1, 2, 3):
        found = [example.ids.pair_id for example in shards.first(count)]
        assert found == ["0-2", "1-0", "1-1"][:count]
    with pytest.raises(KeyError, match="pair_id"):
        shards.first(4)


def test_a_shard_that_is_due_late_is_found_wrong_early(tmp_path):
    """Three hundred steps an epoch; the fault is known in the first moments."""
    paths = write_shards(tmp_path, 40)
    shards = AlignedShards(paths, (), (), 1, "train")
    options = order(batch_size=1, bucket_batches=1, window_shards=1)
    last = trained(shards, options)[-1][1][0].partition("-")[0]  # the shard that comes last
    table = pq.read_table(paths[int(last)])
    ids = pa.array([[1, 999]] * 8)
    pq.write_table(table.set_column(1, "prompt_ids", ids), paths[int(last)])

    def check(examples):
        check_vocabulary((e.ids for e in examples), 500)

    seen = []

    def train_slowly():
        with ExampleStream(shards, options, check) as stream:
            for step, _ in stream.batches():
                seen.append(step)
                time.sleep(0.05)

    with pytest.raises(FPOError, match=f"pair {last}-0 has the token id 999"):
        train_slowly()
    assert len(seen) < 100
