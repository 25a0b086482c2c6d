"""The endless stream of training batches, and one pass over held-out shards.

Which rows a micro-batch holds is a pure function of the seed and of its number: an epoch is the shards in a shuffled
order, the rows of each shuffled; epochs follow one another without a gap; micro-batch k is the k-th cut of that
sequence and goes to rank k mod N.  So every row is used once an epoch, and a stream goes on anywhere from one number.
Rows that come without masks are masked here, by a function of seed, epoch, shard and row: in each epoch another way.

Batches are in the packed form of shards.SCHEMA (an unpacked row is a packed row of one sequence), int32 host tensors:
input_ids, input_mask, segment_ids, positions (B, S), masked_lm_positions, masked_lm_ids (B, P),
next_sentence_positions, next_sentence_labels, next_sentence_weights (B, C).
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np
import torch

from common.errors import UserError
from data.masking import masked, row_keys
from data.shard_checks import read_checked_rows
from data.shard_reader import ShardReader
from data.shards import Shard, count_sequences, metadata_path

HELD_OUT_SEED = 0  # of the masks of held-out rows that come without: the same whenever they are evaluated
ROWS_CHECKED_FIRST = 50_000  # read and checked before anything is built; the others when their shard's turn comes


def shard_order(seed: int, epoch: int, shard_count: int) -> np.ndarray:
    """The order in which an epoch takes the shards."""
    return np.random.default_rng([seed, epoch]).permutation(shard_count)


def row_order(seed: int, epoch: int, shard: int, rows: int) -> np.ndarray:
    """The order in which an epoch takes the rows of one shard."""
    return np.random.default_rng([seed, epoch, shard]).permutation(rows)


def rows_of_epoch(rows_per_shard: list[int], left_out: dict[int, tuple[int, int]], epoch: int) -> list[int]:
    """How many rows each shard gives to an epoch: all, until it is left out.

    `left_out` is {shard: (epoch, rows)}: from that epoch on it gives none, and in that epoch itself only so many.

        >>> [rows_of_epoch([7, 5], {1: (2, 3)}, epoch) for epoch in (1, 2, 3)]
        [[7, 5], [7, 3], [7, 0]]
    """
    rows = list(rows_per_shard)
    for shard, (last_epoch, last_rows) in left_out.items():
        if epoch >= last_epoch:
            rows[shard] = last_rows if epoch == last_epoch else 0
    return rows


def locate(rows_per_shard: list[int], left_out: dict[int, tuple[int, int]], row: int) -> tuple[int, int]:
    """The epoch of a row of the endless sequence, and its place in that epoch."""
    epoch = 0
    for change in sorted({epoch + more for epoch, _ in left_out.values() for more in (0, 1)}):
        size = sum(rows_of_epoch(rows_per_shard, left_out, epoch))  # the same for all epochs before the change
        if row < (change - epoch) * size:
            break
        row -= (change - epoch) * size
        epoch = change
    more, place = divmod(row, sum(rows_of_epoch(rows_per_shard, left_out, epoch)))
    return epoch + more, place


def pieces(seed: int, rows_per_shard: list[int], first: int, count: int,
           left_out: dict[int, tuple[int, int]] | None = None) -> list[tuple[int, int, int, int]]:
    """Where rows first … first+count−1 of the endless sequence lie: (epoch, shard, start, stop) in turn, start and stop
    counting in the shard's row_order.  For `left_out` see rows_of_epoch: what is left out moves no other row.

        >>> pieces(seed=1, rows_per_shard=[3], first=2, count=5)
        [(0, 0, 2, 3), (1, 0, 0, 3), (2, 0, 0, 1)]
    """
    left_out = left_out or {}
    epoch, offset = locate(rows_per_shard, left_out, first)
    found = []
    while count:
        rows = rows_of_epoch(rows_per_shard, left_out, epoch)
        for shard in shard_order(seed, epoch, len(rows)).tolist():
            taken = min(max(0, rows[shard] - offset), count)
            if taken:
                found.append((epoch, shard, offset, offset + taken))
            offset = max(0, offset - rows[shard])
            count -= taken
        epoch += 1
    return found


def micro_batch_rows(seed: int, rows_per_shard: list[int], size: int, number: int) -> list[tuple[int, int, int]]:
    """The rows of micro-batch `number` as (epoch, shard, row in the shard): the definition that BatchStream follows."""
    return [(epoch, shard, row)
            for epoch, shard, start, stop in pieces(seed, rows_per_shard, number * size, size)
            for row in row_order(seed, epoch, shard, rows_per_shard[shard])[start:stop].tolist()]


class BatchStream:
    """The micro-batches of one rank, for ever.

    `first_row` is how many rows of the endless sequence all ranks have used up, `left_out` what of it is left out
    (rows_of_epoch): the whole state of a stream.  The next shard is read in the background while one is in use.

    Where a shard cannot be read, the stream ends with a UserError that names it; with `report`, it says so there and
    goes on without the shard.  All ranks leave it out at the same place, wherever the fault was met: `gather` collects
    a value from each.
    """

    def __init__(self, shards: list[Shard], batch_size: int, seed: int, vocab_size: int, rank: int = 0,
                 world_size: int = 1, first_row: int = 0, left_out: dict[int, tuple[int, int]] | None = None,
                 reader: ShardReader | None = None, report=None, gather=lambda value: [value]):
        self.shards = shards
        self.rows_per_shard = [shard.rows for shard in self.shards]
        self.batch_size = batch_size
        self.seed = seed
        self.vocab_size = vocab_size
        self.rank = rank
        self.stride = batch_size * world_size
        self.next_row = first_row  # of the next round, in which each rank takes a micro-batch
        self.left_out = dict(left_out or {})
        self.reader = reader or ShardReader()
        self.report = report
        self.gather = gather
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-reader")
        self.open_shards: dict[tuple[int, int], Future] = {}
        self.settled: set[tuple[int, int]] = set()  # (epoch, shard) that every rank can read

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self.report:
            self.settle()
        parts = [self.part(*piece) for piece in self.own_pieces(self.next_row)]
        self.read_ahead()
        self.next_row += self.stride
        return as_batch({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})

    def pieces(self, first: int, count: int) -> list[tuple[int, int, int, int]]:
        return pieces(self.seed, self.rows_per_shard, first, count, self.left_out)

    def own_pieces(self, row: int) -> list[tuple[int, int, int, int]]:
        """What this rank takes of the round that begins at `row`."""
        return self.pieces(row + self.rank * self.batch_size, self.batch_size)

    def read_pieces(self, row: int) -> list[tuple[int, int, int, int]]:
        """What this rank reads for it: its own; of a round that the ranks settle, all."""
        return self.pieces(row, self.stride) if self.report else self.own_pieces(row)

    def epoch(self, row: int) -> int:
        """The epoch of a row of the endless sequence."""
        return locate(self.rows_per_shard, self.left_out, row)[0]

    def part(self, epoch: int, shard: int, start: int, stop: int) -> dict[str, np.ndarray]:
        rows, order = self.open(epoch, shard).result()
        chosen = order[start:stop]
        rows = {key: values[chosen] for key, values in rows.items()}
        return with_masks(rows, self.shards[shard], row_keys(self.seed, epoch, shard, chosen))

    def open(self, epoch: int, shard: int) -> Future:
        if (epoch, shard) not in self.open_shards:
            self.open_shards[epoch, shard] = self.thread.submit(self.read_shuffled, epoch, shard)
        return self.open_shards[epoch, shard]

    def read_shuffled(self, epoch: int, shard: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        rows = self.reader.call(read_checked_rows, self.shards[shard], self.vocab_size)
        return rows, row_order(self.seed, epoch, shard, self.rows_per_shard[shard])

    def settle(self) -> None:
        """Leave out the shards of the next round that a rank cannot read.

        All ranks see the same shards in the same order, so all ask each other about the same ones.
        """
        while True:
            unsettled = [piece for piece in self.pieces(self.next_row, self.stride) if piece[:2] not in self.settled]
            if not unsettled:
                return
            epoch, shard, start, _ = unsettled[0]
            faults = self.gather(self.fault(epoch, shard))
            if any(faults):
                self.leave_out(epoch, shard, start, next(filter(None, faults)))
            else:
                self.settled.add((epoch, shard))

    def fault(self, epoch: int, shard: int) -> str | None:
        try:
            self.open(epoch, shard).result()
        except UserError as error:
            return str(error)
        return None

    def leave_out(self, epoch: int, shard: int, start: int, fault: str) -> None:
        """Go on without a shard, of which `start` rows were used in this epoch before it became unreadable."""
        self.left_out[shard] = (epoch, start)
        if not any(rows_of_epoch(self.rows_per_shard, self.left_out, epoch + 1)):
            raise UserError(f"no shard is left: the last one was {fault}")
        self.report(f"left out from row {self.next_row} of the run on: {fault}")

    def read_ahead(self) -> None:
        """Forget the shards that are used up, and start on the next ones that this rank will read.

        Those are the shards of the next round, and of the first one that reaches beyond the shard in use: with many
        ranks or small shards, that need not be the shard that follows.
        """
        epoch, shard, _, stop = self.read_pieces(self.next_row)[-1]
        rest = rows_of_epoch(self.rows_per_shard, self.left_out, epoch)[shard] - stop
        rounds = (self.next_row + self.stride, self.next_row + self.stride + rest // self.stride * self.stride)
        wanted = [(epoch, shard), *(piece[:2] for row in rounds for piece in self.read_pieces(row))]
        self.open_shards = {key: future for key, future in self.open_shards.items() if key in wanted}
        self.settled.intersection_update(wanted)
        for key in wanted:
            self.open(*key)

    def finish_reading(self) -> None:
        """Wait until the shards that are read ahead are there, or found to be unreadable."""
        wait(self.open_shards.values())

    def state(self) -> dict:
        """What the order of the rows depends on beside the seed, in plain values, for a checkpoint."""
        names = [shard.path.name for shard in self.shards]
        return {"shards": dict(zip(names, self.rows_per_shard, strict=True)),
                "left_out": {names[shard]: list(place) for shard, place in self.left_out.items()}}

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)


def as_before(found: list[Shard], state: dict, skip_bad_shards: bool,
              report) -> tuple[list[Shard], dict[int, tuple[int, int]]]:
    """The shards of a run that goes on, and those of them that are left out, by the `state` of its stream.

    A shard that is not found any more keeps its place in the order; its turn will show whether it can be read.
    UserError where one is gone and the run may not go on without it.
    """
    found_now = {shard.path.name: shard for shard in found}
    if any(state["shards"].get(name) != shard.rows for name, shard in found_now.items()):
        report("the shards are not those that the run began with: rows of this epoch may be used twice, or not at all")
        return found, {}
    folder = found[0].path.parent
    gone = sorted(set(state["shards"]) - set(found_now) - set(state["left_out"]))
    if gone and not skip_bad_shards:
        raise UserError(f"{folder / gone[0]}: the run began with this shard, and now it is gone ({len(gone)} are); "
                        f"put it back, or go on without it by --skip_bad_shards")
    names = list(state["shards"])
    shards = [found_now.get(name) or replace(found[0], path=folder / name, rows=rows)
              for name, rows in state["shards"].items()]
    return shards, {names.index(name): tuple(place) for name, place in state["left_out"].items()}


def check_first_rows(shards: list[Shard], vocab_size: int, reader: ShardReader) -> None:
    """Check the values of the first shards, so that most mistakes are found before a model is built."""
    checked = 0
    for shard in shards:
        if checked >= ROWS_CHECKED_FIRST:
            return
        reader.call(read_checked_rows, shard, vocab_size)
        checked += shard.rows


def with_masks(rows: dict[str, np.ndarray], shard: Shard, keys: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of a shard with their masks: their own, or by the shard's rule, from a key for each row."""
    return rows | masked(rows, shard.rule, shard.prediction_slots, keys) if shard.rule else rows


def as_batch(rows: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Rows of either form as a batch (see the top of this file)."""
    if "positions" not in rows:
        count, length = rows["input_ids"].shape
        rows = {**rows,
                "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)),
                "next_sentence_positions": np.zeros((count, 1), np.int32),
                "next_sentence_labels": rows["next_sentence_labels"].reshape(count, 1),
                "next_sentence_weights": np.ones((count, 1), np.int32)}
    return {key: torch.from_numpy(values.astype(np.int32)) for key, values in rows.items()}


def sequences_in(batch: dict[str, torch.Tensor]) -> int:
    """How many sequences a batch on the host holds."""
    return int(batch["next_sentence_weights"].sum())


def batches_once(shards: list[Shard], batch_size: int, vocab_size: int):
    """Every row once, in order, in batches of one size: the last is filled up with empty rows, which count nowhere."""
    pending: dict[str, torch.Tensor] | None = None
    with ShardReader() as reader:
        for number, shard in enumerate(shards):
            rows = reader.call(read_checked_rows, shard, vocab_size)
            keys = row_keys(HELD_OUT_SEED, 0, number, np.arange(shard.rows))
            batch = as_batch(with_masks(rows, shard, keys))
            pending = batch if pending is None else {key: torch.cat([pending[key], batch[key]]) for key in batch}
            while len(pending["input_ids"]) >= batch_size:
                yield {key: values[:batch_size] for key, values in pending.items()}
                pending = {key: values[batch_size:] for key, values in pending.items()}
    if pending is not None and len(pending["input_ids"]):
        yield {key: with_empty_rows(values, batch_size) for key, values in pending.items()}


def with_empty_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([values, values.new_zeros(rows - len(values), *values.shape[1:])])


def average_sequences_per_row(shards: list[Shard], reader: ShardReader, skip_bad_shards: bool = False) -> float:
    """How many sequences a row holds on average: 1 where unpacked, else from the packer's metadata, else counted."""
    if not shards[0].packed:
        return 1.0
    metadata = metadata_path(shards[0].path.parent.resolve())
    try:
        average = json.loads(metadata.read_text(encoding="utf-8"))["avg_seq_per_sample"]
    except FileNotFoundError:
        return counted_sequences_per_row(shards, reader, skip_bad_shards)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{metadata}: no avg_seq_per_sample can be read from it ({error!r})") from None
    if not isinstance(average, int | float) or not 1.0 <= average <= shards[0].max_sequences:
        raise UserError(f"{metadata}: avg_seq_per_sample is {average!r}, "
                        f"not a number from 1 to the {shards[0].max_sequences} sequences that a row can hold")
    return float(average)


def counted_sequences_per_row(shards: list[Shard], reader: ShardReader, skip_bad_shards: bool) -> float:
    sequences, rows = 0, 0
    for shard in shards:
        try:
            sequences += reader.call(count_sequences, shard)
            rows += shard.rows
        except UserError:
            if not skip_bad_shards:
                raise
    return sequences / max(rows, 1)
