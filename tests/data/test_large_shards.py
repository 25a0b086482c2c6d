"""Shards of more than PIECE_BYTES are read in pieces: the order of their rows, what is skipped, and the memory."""

import tracemalloc
from collections import Counter
from contextlib import ExitStack, closing

import h5py
import numpy as np
import pytest
import torch

from common.errors import UserError
from data import shards, token_counts
from data.dataloader import BatchStream, batches_once, check_first_rows
from data.shard_reader import ShardReader
from data.shards import find_shards, read_rows, write_shard
from devices.device import proc_bytes
from parallel.ranks import SingleRank
from parallel.rendezvous import RankInfo
from tests.support import samples, small_run, synthetic

LARGE, SMALL = 50, 9  # rows of the shards
PIECES = [(0, 17), (17, 17), (34, 16)]  # first row and rows of the large one's

ORDER = ("0.0 0.5 0.6 0.2 0.4 0.1 0.3 2.0 2.1 2.2 2.3 2.4 1.4 1.2 1.10 1.11 1.7 1.1 1.3 1.9 1.0 1.12 1.8 1.6 1.5 "
         "0.3 0.0 0.2 0.1 0.4 0.6 0.5 2.2 2.1 2.3 2.0 2.4 1.9 1.2 1.6 1.1 1.4 1.8 1.0 1.11 1.12 1.7 1.3 1.10 1.5")


@pytest.fixture
def reader():
    with ShardReader() as reader:
        yield reader


def large_and_small(folder, form: str) -> list[shards.Shard]:
    """A set of a large and a small shard, unpacked, without masks, or packed."""
    for name, rows, seed in (("a_training.hdf5", LARGE, 1), ("b rows 2_training.hdf5", SMALL, 2)):
        lengths = np.random.default_rng(seed).integers(5, samples.SEQUENCE_LENGTH + 1, rows)
        path = folder / name
        if form == "packed":
            two = samples.unpacked_batch(np.full(2 * rows, 12), seed)
            batch = samples.packed_batch(two, [[row, row + rows] for row in range(rows)], samples.SEQUENCE_LENGTH)
            write_shard(path, {key: values.numpy() for key, values in batch.items()})
        else:
            write = synthetic.write_shard_without_masks if form == "dynamic" else synthetic.write_unpacked_shard
            write(path, lengths, seed, samples.SEQUENCE_LENGTH, samples.PREDICTIONS)
    return find_shards(folder)


@pytest.fixture
def in_three(tmp_path, monkeypatch):
    """A function that writes large_and_small, with PIECE_BYTES so low that the large one has three pieces."""
    def written(form: str = "unpacked", folder="set") -> list[shards.Shard]:
        found = large_and_small(tmp_path / folder, form)
        monkeypatch.setattr(shards, "PIECE_BYTES", 20 * found[0].row_bytes)
        assert [(piece.first_row, piece.rows) for piece in found[0].pieces()] == PIECES
        return found

    return written


@pytest.fixture
def stream_of(reader):
    """A function that opens a stream of batches of 4 rows, which the end of the test closes."""
    with ExitStack() as streams:
        def opened(found, rank=0, world_size=1, **options) -> BatchStream:
            ranks = SingleRank(RankInfo(rank, world_size))
            stream = BatchStream(found, 4, 7, synthetic.VOCAB_SIZE, ranks=ranks, reader=reader, **options)
            return streams.enter_context(closing(stream))

        yield opened


def same(batch, other) -> bool:
    return all(torch.equal(batch[key], other[key]) for key in batch)


@pytest.mark.parametrize("form", ["unpacked", "dynamic", "packed"])
def test_pieces_are_used_like_shards(in_three, tmp_path, stream_of, form):
    """The set in pieces gives the batches, and masks, of one whose shards are those pieces, on every rank."""
    found = in_three(form)
    for number, piece in enumerate([*found[0].pieces(), found[1]]):
        write_shard(tmp_path / "cut" / f"{number}_training.hdf5", read_rows(piece), piece.rule, piece.prediction_slots)
    for rank, world_size in ((0, 1), (1, 2), (2, 3)):
        pieces, cut = (stream_of(shards, rank, world_size) for shards in (found, find_shards(tmp_path / "cut")))
        assert len(pieces.pieces) == 4
        for _ in range(3 * (LARGE + SMALL) // (4 * world_size)):  # three epochs
            assert same(next(pieces), next(cut))


def test_the_order_of_shards_of_ordinary_size_is_that_of_earlier_versions(tmp_path, stream_of):
    """The rows of two epochs, as the version before that of the pieces used them; each as shard and row."""
    found = find_shards(samples.write_dataset(tmp_path))
    rows = {tuple(ids): f"{number}.{row}" for number, shard in enumerate(found)
            for row, ids in enumerate(read_rows(shard)["input_ids"].tolist())}
    stream = stream_of(found)
    used = [rows[tuple(ids)] for _ in range(13) for ids in next(stream)["input_ids"].tolist()][:50]
    assert " ".join(used) == ORDER
    assert stream.state_dict(0) == {"rows": 52, "shards": {f"sample_training_{number}.hdf5": rows for number, rows in
                                                           enumerate((7, 13, 5))}, "skipped_shards": {}}


@pytest.mark.parametrize("later_pieces", [20, 7, 10_000])  # rows that fit in one when the run goes on
def test_a_run_goes_on_with_the_pieces_that_it_began_with(in_three, monkeypatch, stream_of, later_pieces):
    found = in_three()
    whole = stream_of(found)
    batches = [next(whole) for _ in range(9)]
    state = whole.state_dict(batches_ahead=2)
    expected = [*batches[7:], *(next(whole) for _ in range(20))]
    monkeypatch.setattr(shards, "PIECE_BYTES", later_pieces * found[0].row_bytes)
    resumed = stream_of(found)
    resumed.load_state_dict(state, "ckpt_1.pt")
    assert all(same(next(resumed), batch) for batch in expected)


def test_a_run_that_began_without_pieces_keeps_its_order(in_three, monkeypatch, stream_of):
    found = in_three()
    resumed = stream_of(found)
    resumed.load_state_dict({"rows": 4 * 11, "shards": {"a_training.hdf5": LARGE, "b rows 2_training.hdf5": SMALL},
                             "skipped_shards": {}}, "ckpt_1.pt")  # as earlier versions wrote it
    in_pieces = next(stream_of(found))
    monkeypatch.setattr(shards, "PIECE_BYTES", 10**9)
    whole = stream_of(found)
    batches = [next(whole) for _ in range(30)]
    assert not same(batches[0], in_pieces)
    assert all(same(next(resumed), batch) for batch in batches[11:])


def spoil(path, row: int) -> None:
    with h5py.File(path, "a") as file:
        file["input_ids"][row, 3] = 40_000


def test_a_bad_row_is_named_by_its_number_in_the_file_and_only_its_piece_is_skipped(in_three, stream_of):
    found = in_three()
    stored = [tuple(ids) for shard in found for ids in read_rows(shard)["input_ids"].tolist()]
    spoil(found[0].path, 20)
    with pytest.raises(UserError, match=r"a_training\.hdf5: input_ids of row 20 holds 40000"):
        check_everything(stream_of(found))
    warnings = []
    stream = stream_of(found, skip_bad_shards=True, warn=warnings.append)
    used = Counter(tuple(ids) for _ in range(21) for ids in next(stream)["input_ids"].tolist())  # two epochs of 42 rows
    assert used == Counter(dict.fromkeys(stored[:17] + stored[34:], 2))
    assert len(warnings) == 1
    assert "a_training.hdf5 rows 17 to 33: " in warnings[0] and "row 20 holds 40000" in warnings[0]
    state = stream.state_dict(0)
    assert list(state["skipped_shards"]) == ["a_training.hdf5 rows 17 to 33"]
    resumed = stream_of(found, skip_bad_shards=True)
    resumed.load_state_dict(state, "ckpt_1.pt")
    assert all(same(next(resumed), next(stream)) for _ in range(15))


def check_everything(stream) -> None:
    for _ in range(-(-(LARGE + SMALL) // 4)):
        next(stream)


def test_a_large_shard_that_is_gone_is_reported_once_and_skipped(in_three, stream_of):
    found = in_three()
    state = stream_of(found).state_dict(0)
    found[0].path.unlink()
    with pytest.raises(UserError, match=r"/a_training\.hdf5: the run began with this shard, and .* gone \(1 are\)"):
        stream_of(found[1:]).load_state_dict(state, "ckpt_1.pt")
    stream = stream_of(found[1:], skip_bad_shards=True, warn=lambda text: None)
    stream.load_state_dict(state, "ckpt_1.pt")
    rows = [tuple(ids) for _ in range(9) for ids in next(stream)["input_ids"].tolist()]
    assert Counter(rows) == Counter({tuple(ids): 4 for ids in read_rows(found[1])["input_ids"].tolist()})
    assert len(stream.skipped_shards) == 3


@pytest.mark.parametrize("form", ["unpacked", "dynamic", "packed"])
def test_an_evaluation_sees_the_rows_and_masks_of_whole_shards(in_three, monkeypatch, form):
    found = in_three(form)
    pieces = list(batches_once(found, 8, synthetic.VOCAB_SIZE))
    monkeypatch.setattr(shards, "PIECE_BYTES", 10**9)
    whole = list(batches_once(found, 8, synthetic.VOCAB_SIZE))
    assert len(pieces) == len(whole) == 8
    assert all(same(*both) for both in zip(pieces, whole, strict=True))


def test_tokens_of_the_first_pieces_are_counted_whatever_is_counted_at_once(in_three, monkeypatch, reader):
    found = in_three()
    expected = sum(token_counts.count_tokens(read_rows(shard), synthetic.VOCAB_SIZE) for shard in found)
    monkeypatch.setattr(token_counts, "ROWS_COUNTED_AT_ONCE", 7)
    assert np.array_equal(check_first_rows(found, synthetic.VOCAB_SIZE, reader, skip_bad_shards=False), expected)


def test_a_run_says_in_how_many_pieces_it_reads(in_three, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(small_run.write_workspace(tmp_path))
    in_three(folder="data")  # beside three small shards
    small_run.train(max_steps=2, skip_checkpoint=True)
    assert "data: 84 unpacked rows of 24 tokens in 5 shards of data, read in 7 pieces" in capsys.readouterr().out


def test_memory_depends_on_the_piece_and_not_on_the_shard(tmp_path, monkeypatch, reader, stream_of):
    """A shard of 36 MiB of rows, in pieces of 4: two of them here, and one in the reader."""
    path = tmp_path / "a_training.hdf5"
    rows = synthetic.unpacked_rows(np.full(4_000, 100), np.random.default_rng(1), 128, 20)
    write_shard(path, {key: np.concatenate([values] * 10) for key, values in rows.items()})
    piece = 2**22
    monkeypatch.setattr(shards, "PIECE_BYTES", piece)
    found = find_shards(tmp_path, reader=reader)
    assert found[0].rows * found[0].row_bytes > 8 * piece
    before = child_peak(reader)
    tracemalloc.start()
    stream = stream_of(found)
    stream.batch_size = stream.stride = 400
    for _ in range(110):
        next(stream)
    check_first_rows(found, synthetic.VOCAB_SIZE, reader, skip_bad_shards=False)
    _, here = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2 * piece < here < 3.5 * piece
    assert piece / 2 < child_peak(reader) - before < 4 * piece


def child_peak(reader) -> int:
    return proc_bytes(f"/proc/{reader.child.pid}/status", "VmHWM")
