"""The order of the rows as a pure function, and the streams that follow it."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data.dataloader import average_sequences_per_row, batches_once, sequences_in
from data.row_order import row_order, row_ranges, shard_order
from data.shard_reader import ShardReader
from data.shards import columns, find_shards, read_rows, write_shard
from tests.support import samples, synthetic
from tests.support.samples import batch_stream

ROWS_OF_SHARDS = {1: [29], 3: [7, 13, 5], 7: [1, 9, 4, 2, 11, 3, 6]}


def micro_batch_rows(seed: int, rows_per_shard: list[int], size: int, number: int) -> list[tuple[int, int, int]]:
    """The rows of micro-batch `number` as (epoch, shard, row in the shard): the definition that BatchStream follows."""
    return [(epoch, shard, row)
            for epoch, shard, start, stop in row_ranges(seed, rows_per_shard, number * size, size, {})
            for row in row_order(seed, epoch, shard, rows_per_shard[shard])[start:stop].tolist()]


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("rows_per_shard", ROWS_OF_SHARDS.values(), ids=ROWS_OF_SHARDS)
def test_every_row_is_used_once_an_epoch_over_all_ranks(rows_per_shard, world_size):
    size, total = 3, sum(rows_per_shard)
    micro_batches = -(-3 * total // size)  # as many as three epochs take
    by_rank = [[micro_batch_rows(5, rows_per_shard, size, number) for number in range(rank, micro_batches, world_size)]
               for rank in range(world_size)]
    used = [row for ranks in by_rank for batch in ranks for row in batch]
    for epoch in range(3):
        rows = Counter((shard, row) for row_epoch, shard, row in used if row_epoch == epoch)
        assert rows == Counter((shard, row) for shard, count in enumerate(rows_per_shard) for row in range(count))


@pytest.mark.parametrize("rows_per_shard", ROWS_OF_SHARDS.values(), ids=ROWS_OF_SHARDS)
def test_an_epoch_is_the_shards_in_shuffled_order_and_the_rows_of_each_shuffled(rows_per_shard):
    total = sum(rows_per_shard)
    for epoch in range(3):
        expected = [(epoch, shard, row) for shard in shard_order(5, epoch, len(rows_per_shard)).tolist()
                    for row in row_order(5, epoch, shard, rows_per_shard[shard]).tolist()]
        found = [micro_batch_rows(5, rows_per_shard, 1, epoch * total + offset)[0] for offset in range(total)]
        assert found == expected


@given(rows_per_shard=st.lists(st.integers(1, 9), min_size=1, max_size=6), world_size=st.integers(1, 8),
       size=st.integers(1, 40), seed=st.integers(0, 2**31), step=st.integers(0, 50))
def test_a_global_step_is_the_same_rows_for_any_number_of_ranks(rows_per_shard, world_size, size, seed, step):
    """N ranks, each with one micro-batch of a step, against one rank with N of them."""
    first = step * world_size
    together = [row for number in range(first, first + world_size)
                for row in micro_batch_rows(seed, rows_per_shard, size, number)]
    one_large = micro_batch_rows(seed, rows_per_shard, size * world_size, step)
    assert together == one_large


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(row_order(seed, epoch, 0, 50)) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 6


def test_ranges_span_shards_and_epochs():
    found = row_ranges(seed=0, rows_per_shard=[2, 3], first=4, count=7, skipped_shards={})
    assert sum(stop - start for *_, start, stop in found) == 7
    assert [epoch for epoch, *_ in found] == sorted(epoch for epoch, *_ in found)
    assert {epoch for epoch, *_ in found} == {0, 1, 2}


@pytest.fixture
def folder(tmp_path):
    return samples.write_dataset(tmp_path)


@pytest.fixture
def reader():
    with ShardReader() as reader:
        yield reader


def stored_rows(found) -> list[bytes]:
    return [row.tobytes() for shard in found for row in read_rows(shard, ["input_ids"])["input_ids"].astype(np.int32)]


@pytest.mark.parametrize("batch_size", [1, 3, 25, 60])
def test_stream_delivers_every_row_once_an_epoch(folder, batch_size):
    found = find_shards(folder)
    stream = batch_stream(found, batch_size)
    rows = [row.numpy().tobytes() for _ in range(-(-100 // batch_size)) for row in next(stream)["input_ids"]]
    for epoch in range(4):
        assert Counter(rows[epoch * 25:(epoch + 1) * 25]) == Counter(stored_rows(found))
    assert rows[:25] != rows[25:50]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_stream_follows_the_pure_function_on_every_rank(folder, world_size):
    found = find_shards(folder)
    contents = [read_rows(shard)["input_ids"] for shard in found]
    rows_per_shard = [shard.rows for shard in found]
    for rank in range(world_size):
        stream = batch_stream(found, 4, 9, rank, world_size)
        for number in range(rank, 20, world_size):
            rows = micro_batch_rows(9, rows_per_shard, 4, number)
            assert np.array_equal(next(stream)["input_ids"], np.stack([contents[shard][row] for _, shard, row in rows]))


def test_stream_continues_from_any_row(folder):
    found = find_shards(folder)
    whole = batch_stream(found, 3)
    batches = [next(whole) for _ in range(20)]
    later = batch_stream(found, 3, first_row=3 * 11)
    for expected in batches[11:]:
        batch = next(later)
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_files_that_an_operating_system_leaves_beside_shards_do_no_harm(tmp_path):
    folder = samples.write_dataset(tmp_path / "data")
    expected = [shard.path for shard in find_shards(folder)]
    for shard in expected:
        shard.with_name(f"._{shard.name}").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert [shard.path for shard in find_shards(folder)] == expected


def test_shards_without_rows_are_passed_over(tmp_path):
    folder = samples.write_dataset(tmp_path, (2, 1))
    empty = {key: values[:0] for key, values in read_rows(find_shards(folder)[0]).items()}
    write_shard(folder / "sample_training_9.hdf5", empty)
    rows = next(batch_stream(find_shards(folder), 3, 0))["input_ids"]
    assert Counter(row.numpy().tobytes() for row in rows) == Counter(stored_rows(find_shards(folder)))


def test_one_pass_holds_every_row_once_and_fills_up_with_empty_rows(folder):
    found = find_shards(folder)
    batches = list(batches_once(found, 4, synthetic.VOCAB_SIZE))
    assert {len(batch["input_ids"]) for batch in batches} == {4}
    rows = [row.numpy().tobytes() for batch in batches for row, mask in zip(batch["input_ids"], batch["input_mask"],
                                                                            strict=True) if mask.any()]
    assert Counter(rows) == Counter(stored_rows(found))
    assert sum(sequences_in(batch) for batch in batches) == 25


def test_impossible_values_are_named_with_file_and_row(folder):
    found = find_shards(folder)
    with pytest.raises(UserError, match=r"sample_training_\d\.hdf5: input_ids of row \d+ holds \d+, not from 0 to 999"):
        next(batch_stream(found, 4, vocab_size=1000))


def packed_rows():
    batch = samples.unpacked_batch([5, 9, 6, 7])
    return {key: value.numpy() for key, value in samples.packed_batch(batch, [[0, 1], [2], [3]], 24).items()}


def test_sequences_per_row_come_from_metadata_else_from_the_shards(tmp_path, reader):
    folder = tmp_path / "packed"
    write_shard(folder / "part.hdf5", packed_rows())
    found = find_shards(folder)
    assert average_sequences_per_row(found, reader) == pytest.approx(4 / 3)
    (tmp_path / "packed_metadata.json").write_text('{"avg_seq_per_sample": 1.5}')
    assert average_sequences_per_row(found, reader) == 1.5
    for bad in ("{}", "[1]", '{"avg_seq_per_sample": "many"}', '{"avg_seq_per_sample": 99}', "{"):
        (tmp_path / "packed_metadata.json").write_text(bad)
        with pytest.raises(UserError, match="packed_metadata.json"):
            average_sequences_per_row(found, reader)


def test_unpacked_rows_become_packed_rows_of_one_sequence(folder):
    batch = next(batch_stream(find_shards(folder), 5))
    assert set(batch) == set(columns(packed=True))
    assert batch["positions"][3].tolist() == list(range(samples.SEQUENCE_LENGTH))
    assert batch["next_sentence_labels"].shape == batch["next_sentence_weights"].shape == (5, 1)
    assert sequences_in(batch) == 5
