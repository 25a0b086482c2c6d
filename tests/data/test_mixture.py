"""Mixtures of training sets: shares, order, and every row once an epoch of its source."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data.micro_batches import MicroBatchOrder
from data.mixture import Mixture, parse_sources
from data.shards import Shard, find_shards, read_rows
from tests.support import samples
from tests.support.samples import batch_stream

PARTS = st.lists(st.integers(1, 60), min_size=1, max_size=6).map(tuple)


@given(PARTS, st.integers(0, 3))
def test_at_any_point_each_source_has_its_share_to_less_than_one_micro_batch(parts, periods):
    mixture = Mixture(parts)
    numbers = np.arange(periods * mixture.period, (periods + 1) * mixture.period + 1)
    for source, part in enumerate(parts):
        exact = numbers * part / mixture.period
        assert np.abs(mixture.count(source, numbers) - exact).max() < 1


@given(PARTS, st.integers(0, 500))
def test_numbers_and_counts_are_each_others_inverse(parts, own_number):
    mixture = Mixture(parts)
    for source in range(len(parts)):
        number = mixture.number(source, own_number)
        assert mixture.order[number % mixture.period] == source
        assert mixture.count(source, number) == own_number


def test_weights_become_the_smallest_whole_numbers():
    sources = parse_sources(["a=x:0.5", "b=y:1.25", "c=z:.25"])
    assert [source.weight for source in sources] == [Fraction(1, 2), Fraction(5, 4), Fraction(1, 4)]
    assert Mixture.of(sources).parts == (2, 5, 1)


@pytest.mark.parametrize("words, complaint", [
    (["a", "b"], "--input_dir a: several data sets are given as NAME=DIR:WEIGHT"),
    (["a=x:0", "b=y:1"], "a=x:0: .*with a weight above 0"),
    (["a=x:1.2.3", "b=y:1"], "a=x:1.2.3: .*with a weight above 0"),
    (["a=s3://bucket/x", "b=y:1"], "--input_dir a=s3://bucket/x: several"),
    (["a=x:1", "a=y:1"], "two data sets have the name a"),
    (["a=x:1", "b=y:0.00001"], "the weights 100000, 1 add up to more than 10000"),
])
def test_mixtures_that_cannot_be_are_refused(words, complaint):
    with pytest.raises(UserError, match=complaint):
        Mixture.of(parse_sources(words))


def test_a_path_with_an_equals_sign_is_one_folder():
    assert [source.folder for source in parse_sources(["/runs/rate=0.1/data"])] == ["/runs/rate=0.1/data"]


def order_of(parts, rows_of_sources, size, rank=0, world_size=1, reads_all=False) -> MicroBatchOrder:
    order = MicroBatchOrder(7, size, rank, world_size, reads_all, Mixture(parts))
    order.set_pieces([Shard(path=Path(f"{number}.hdf5"), rows=rows, row_bytes=1, packed=False, sequence_length=8,
                            prediction_slots=1, max_sequences=1, source=f"source {source}")
                      for source, shards in enumerate(rows_of_sources) for number, rows in enumerate(shards)])
    return order


SETS = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1,
                max_size=3)


@given(SETS, st.integers(1, 7), st.integers(1, 5), st.integers(0, 30), st.integers(1, 7))
def test_each_row_is_used_once_an_epoch_of_its_source_also_after_a_restart(sets, size, world_size, stop, new_size):
    """So many rounds with one micro-batch size, then, resumed, with another, on one rank and on several."""
    parts, shards = zip(*sets, strict=True)
    pieces = [rows for source in shards for rows in source]
    used = [Counter() for _ in pieces]
    first = [order_of(parts, shards, size, rank, world_size) for rank in range(world_size)]
    for row in range(0, stop * first[0].stride, first[0].stride):
        for order in first:
            count_rows(used, order.own_ranges(row, {}))
    second, row = order_of(parts, shards, new_size), stop * first[0].stride
    second.load_state_dict(first[0].state_dict(), row, "here")
    for later in range(row, row + 30 * new_size, new_size):
        count_rows(used, second.own_ranges(later, {}))
    for rows, counts in zip(pieces, used, strict=True):
        epochs = Counter(epoch for epoch, _ in counts)
        complete = max(epochs, default=0)
        assert all(count == 1 for count in counts.values())
        assert all(epochs[epoch] == rows for epoch in range(complete))


def count_rows(used, ranges) -> None:
    for epoch, piece, start, stop in ranges:
        used[piece].update((epoch, row) for row in range(start, stop))


@given(SETS, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.data())
def test_the_next_shard_of_each_source_is_read_ahead(sets, size, world_size, reads_all, data):
    """Of each source, the next two pieces that this rank reads are wanted: the one in use and the one after it."""
    parts, shards = zip(*sets, strict=True)
    order = order_of(parts, shards, size, data.draw(st.integers(0, world_size - 1)), world_size, reads_all)
    row = order.stride * data.draw(st.integers(0, 20))
    wanted = {rows[:2] for ahead in order.rounds_ahead(row, {}) for rows in order.ranges_read(ahead, {})}
    for source in order.sources:
        coming = [rows[:2] for later in range(row, row + 60 * order.stride, order.stride)
                  for rows in order.ranges_read(later, {}) if rows[1] in source.pieces]
        assert set(list(dict.fromkeys(coming))[:2]) <= wanted


@pytest.mark.parametrize("state, complaint", [
    ({"parts": {"source 0": 1, "source 1": 2}}, "the run began with the mixture .*'source 1': 2.*now it is"),
    ({"parts": {"source 0": 1, "source 1": 1}, "batch_size": 0, "rows_before": [0, 0]}, "position in its mixture"),
    ({"parts": {"source 0": 1, "source 1": 1}, "batch_size": 2, "rows_before": [0]}, "position in its mixture"),
    ({}, "the run began with the mixture {'': 1}"),
])
def test_a_position_of_another_mixture_or_a_malformed_one_is_refused(state, complaint):
    with pytest.raises(UserError, match=complaint):
        order_of((1, 1), ([5], [3]), 2).load_state_dict(state, 8, "ckpt_4.pt: data")


def test_a_stream_mixes_real_shards_and_continues_where_it_stopped(tmp_path):
    shards = []
    for name, rows in (("large", (13, 7)), ("small", (5,))):
        found = find_shards(samples.write_dataset(tmp_path / name, rows, seed=len(shards)))
        shards += [replace(shard, source=name) for shard in found]
    stream, again = (batch_stream(shards, 2, mixture=Mixture((3, 1))) for _ in range(2))
    batches = [next(stream)["input_ids"] for _ in range(40)]
    for _ in range(11):
        next(again)
    state, resumed = again.state_dict(0), batch_stream(shards, 2, mixture=Mixture((3, 1)))
    resumed.load_state_dict(state, "ckpt")
    assert all(torch.equal(next(resumed)["input_ids"], batch) for batch in batches[11:])
    contents = {row.tobytes(): shard.source for shard in shards
                for row in read_rows(shard, ["input_ids"])["input_ids"].astype(np.int32)}
    sources = Counter(contents[row.numpy().tobytes()] for batch in batches for row in batch)
    assert sources == {"large": 60, "small": 20} and stream.epochs(80) == {"large": 3, "small": 4}
