"""The endless stream of training batches, and one pass over held-out shards.

Which rows a micro-batch holds is a pure function of the seed and of its number: an epoch is the shards in a shuffled
order, the rows of each shuffled; epochs follow one another without a gap; micro-batch k is the k-th cut of that
sequence and goes to rank k mod N.  So every row is used once an epoch, and a stream goes on anywhere from one number.

Batches are in the packed form of shards.SCHEMA (an unpacked row is a packed row of one sequence), int32 host tensors:
input_ids, input_mask, segment_ids, positions (B, S), masked_lm_positions, masked_lm_ids (B, P),
next_sentence_positions, next_sentence_labels, next_sentence_weights (B, C).
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

import shards as shard_files
from cli import UserError
from shards import Shard

ROWS_CHECKED_FIRST = 50_000  # read and checked before anything is built; the others when their shard's turn comes


def shard_order(seed: int, epoch: int, shard_count: int) -> np.ndarray:
    """The order in which an epoch takes the shards."""
    return np.random.default_rng([seed, epoch]).permutation(shard_count)


def row_order(seed: int, epoch: int, shard: int, rows: int) -> np.ndarray:
    """The order in which an epoch takes the rows of one shard."""
    return np.random.default_rng([seed, epoch, shard]).permutation(rows)


def pieces(seed: int, rows_per_shard: list[int], first: int, count: int) -> list[tuple[int, int, int, int]]:
    """Where rows first … first+count−1 of the endless sequence lie: (epoch, shard, start, stop) in turn, start and stop
    counting in the shard's row_order.

        >>> pieces(seed=1, rows_per_shard=[3], first=2, count=5)
        [(0, 0, 2, 3), (1, 0, 0, 3), (2, 0, 0, 1)]
    """
    total = sum(rows_per_shard)
    found = []
    while count:
        epoch, offset = divmod(first, total)
        for shard in shard_order(seed, epoch, len(rows_per_shard)).tolist():
            rows = rows_per_shard[shard]
            if offset < rows and count:
                taken = min(rows - offset, count)
                found.append((epoch, shard, offset, offset + taken))
                first, count, offset = first + taken, count - taken, 0
            else:
                offset = max(0, offset - rows)
    return found


def micro_batch_rows(seed: int, rows_per_shard: list[int], size: int, number: int) -> list[tuple[int, int, int]]:
    """The rows of micro-batch `number` as (epoch, shard, row in the shard): the definition that BatchStream follows."""
    return [(epoch, shard, row)
            for epoch, shard, start, stop in pieces(seed, rows_per_shard, number * size, size)
            for row in row_order(seed, epoch, shard, rows_per_shard[shard])[start:stop].tolist()]


class BatchStream:
    """The micro-batches of one rank, for ever.

    `first_row` is how many rows of the endless sequence all ranks have used up: the whole state of a stream.
    The next shard is read in the background while one is in use.
    """

    def __init__(self, shards: list[Shard], batch_size: int, seed: int, vocab_size: int, rank: int = 0,
                 world_size: int = 1, first_row: int = 0):
        self.shards = [shard for shard in shards if shard.rows]
        self.rows_per_shard = [shard.rows for shard in self.shards]
        self.batch_size = batch_size
        self.seed = seed
        self.vocab_size = vocab_size
        self.stride = batch_size * world_size
        self.next_row = first_row + rank * batch_size
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-reader")
        self.open_shards: dict[tuple[int, int], Future] = {}

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        wanted = pieces(self.seed, self.rows_per_shard, self.next_row, self.batch_size)
        parts = [self.part(*piece) for piece in wanted]
        self.next_row += self.stride
        self.read_ahead(wanted)
        return as_batch({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})

    def part(self, epoch: int, shard: int, start: int, stop: int) -> dict[str, np.ndarray]:
        self.open(epoch, shard)
        rows, order = self.open_shards[epoch, shard].result()
        return {key: values[order[start:stop]] for key, values in rows.items()}

    def open(self, epoch: int, shard: int) -> None:
        if (epoch, shard) not in self.open_shards:
            self.open_shards[epoch, shard] = self.reader.submit(self.read_shuffled, epoch, shard)

    def read_shuffled(self, epoch: int, shard: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        rows = read_checked(self.shards[shard], self.vocab_size)
        return rows, row_order(self.seed, epoch, shard, self.rows_per_shard[shard])

    def read_ahead(self, used: list[tuple[int, int, int, int]]) -> None:
        """Forget the shards that are used up, and start on the one after the shard in use."""
        epoch, shard, _, stop = used[-1]
        order = shard_order(self.seed, epoch, len(self.shards)).tolist()
        place = order.index(shard)
        following = ((epoch, order[place + 1]) if place + 1 < len(order)
                     else (epoch + 1, int(shard_order(self.seed, epoch + 1, len(self.shards))[0])))
        self.open_shards = {key: future for key, future in self.open_shards.items()
                            if key in ((epoch, shard), following)}
        self.open(*following)


def read_checked(shard: Shard, vocab_size: int) -> dict[str, np.ndarray]:
    """All rows of a shard; UserError naming file, row and value where the model could not take one."""
    rows = shard_files.read(shard)
    fault = shard_files.first_fault(shard, rows, vocab_size)
    if fault:
        raise UserError(f"{shard.path}: {fault}")
    return rows


def check_first_rows(shards: list[Shard], vocab_size: int) -> None:
    """Check the values of the first shards, so that most mistakes are found before a model is built."""
    checked = 0
    for shard in shards:
        if checked >= ROWS_CHECKED_FIRST:
            return
        read_checked(shard, vocab_size)
        checked += shard.rows


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
    for shard in shards:
        batch = as_batch(read_checked(shard, vocab_size))
        pending = batch if pending is None else {key: torch.cat([pending[key], batch[key]]) for key in batch}
        while len(pending["input_ids"]) >= batch_size:
            yield {key: values[:batch_size] for key, values in pending.items()}
            pending = {key: values[batch_size:] for key, values in pending.items()}
    if pending is not None and len(pending["input_ids"]):
        yield {key: with_empty_rows(values, batch_size) for key, values in pending.items()}


def with_empty_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([values, values.new_zeros(rows - len(values), *values.shape[1:])])


def average_sequences_per_row(shards: list[Shard]) -> float:
    """How many sequences a row holds on average: 1 where unpacked, else from the packer's metadata, else counted."""
    if not shards[0].packed:
        return 1.0
    folder = shards[0].path.parent.resolve()
    metadata = folder.parent / f"{folder.name}_metadata.json"
    try:
        average = json.loads(metadata.read_text(encoding="utf-8"))["avg_seq_per_sample"]
    except FileNotFoundError:
        return counted_sequences_per_row(shards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{metadata}: no avg_seq_per_sample can be read from it ({error!r})") from None
    if not isinstance(average, int | float) or not 1.0 <= average <= shards[0].max_sequences:
        raise UserError(f"{metadata}: avg_seq_per_sample is {average!r}, "
                        f"not a number from 1 to the {shards[0].max_sequences} sequences that a row can hold")
    return float(average)


def counted_sequences_per_row(shards: list[Shard]) -> float:
    key = "next_sentence_weights"
    sequences = sum(int(np.count_nonzero(shard_files.read(shard, [key])[key])) for shard in shards)
    return sequences / sum(shard.rows for shard in shards)
