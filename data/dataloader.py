"""The endless stream of training batches, and one pass over held-out shards.

Micro-batch k of the endless sequence (micro_batches.py) goes to rank k mod N.  Rows without masks are masked here,
by a function of seed, epoch, shard and row.  Large shards are read in pieces (Shard.pieces): in the order of the rows,
and wherever a number stands for a shard here, a piece is a shard of its own.

Batches are in the packed form of shards.SCHEMA (an unpacked row is a packed row of one sequence), int32 host tensors:
input_ids, input_mask, segment_ids, positions (B, S), masked_lm_positions, masked_lm_ids (B, P),
next_sentence_positions, next_sentence_labels, next_sentence_weights (B, C).  Rows made with --no_nsp have no
next_sentence_labels.
"""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import torch

from common.errors import UserError, dictionary, whole_number
from data.masking import masked, row_keys
from data.micro_batches import MicroBatchOrder
from data.mixture import Mixture
from data.row_checks import read_checked_rows
from data.row_order import row_order
from data.shard_fetcher import ShardFetcher
from data.shard_reader import IN_PROCESS, ShardReader
from data.shards import LABELS, ROWS, SUFFIX, Shard, count_sequences, metadata_path
from data.token_counts import ROWS_CHECKED_FIRST, read_checked_counts

RANKS_APART = 2  # rounds at most: a rank takes a micro-batch from the stream before the step that comes before it
HELD_OUT_SEED = 0  # for masking held-out rows without masks: the same masks at every evaluation
MASKED_TOGETHER = 512  # rows


@dataclass
class BatchStream:
    """The endless micro-batches of one rank of `ranks` (parallel.ranks).

    The next piece is read in the background while one is in use.  A piece that cannot be read ends the stream with a
    UserError; with `skip_bad_shards` it is reported to `warn`, and all ranks skip it at the same row.
    """

    shards: list[Shard]
    batch_size: int  # rows of a micro-batch
    seed: int
    vocab_size: int
    _: KW_ONLY
    ranks: object
    reader: ShardReader
    mixture: Mixture = field(default_factory=Mixture)  # of the sources, in the order in which `shards` names them
    skip_bad_shards: bool = False
    warn: Callable[[str], None] = print

    def __post_init__(self):
        self.pieces = in_pieces(self.shards)
        self.order = MicroBatchOrder(self.seed, self.batch_size, self.ranks.rank, self.ranks.world_size,
                                     self.skip_bad_shards, self.mixture)  # with skipping, all ranks look at all shards
        self.order.set_pieces(self.pieces)
        self.next_row = 0  # of the next round
        self.skipped_shards: dict[int, tuple[int, int]] = {}  # see rows_of_epoch
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-reader")
        self.open_shards: dict[tuple[int, int], Future] = {}
        self.readable: set[tuple[int, int]] = set()  # (epoch, shard) that every rank can read
        self.searched: set[int] = set()  # shards whose rows without a token are counted
        self.ready: dict[tuple, dict[str, np.ndarray]] = {}  # rows that are masked already, see read_ranges
        self.fetcher = ShardFetcher(self.warn)
        self.fetched_ahead: set[tuple[int, int]] = set()  # (epoch, shard) that were wanted when it last got an order
        self.last_row: int | None = None  # of the run, where that is known: what lies behind it is not read ahead

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self.skip_bad_shards:
            self.skip_unreadable()
        parts = [self.read_range(*rows) for rows in self.order.own_ranges(self.next_row, self.skipped_shards)]
        self.read_ahead()
        self.next_row += self.order.stride
        return as_batch({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})

    def ranges_read(self, row: int) -> list[tuple[int, int, int, int]]:
        return self.order.ranges_read(row, self.skipped_shards)

    @property
    def next_source(self) -> int:
        """The number of the source that gives the next micro-batch."""
        return self.order.source_of(self.next_row)

    def epochs(self, row: int) -> dict[str, int]:
        """The epoch of each source, by name, where a round begins."""
        return self.order.epochs(row, self.skipped_shards)

    def read_range(self, epoch: int, shard: int, start: int, stop: int) -> dict[str, np.ndarray]:
        if (epoch, shard, start, stop) not in self.ready:
            rows, _ = self.open(epoch, shard).result()
            self.count_empty(shard, rows["input_mask"])
            source = self.pieces[shard].source
            self.ready = {key: rows for key, rows in self.ready.items() if self.pieces[key[1]].source != source} \
                | self.read_ranges(epoch, shard, start, stop)
        return self.ready.pop((epoch, shard, start, stop))

    def read_ranges(self, epoch: int, shard: int, start: int, stop: int) -> dict[tuple, dict[str, np.ndarray]]:
        """A range, and where its rows are to be masked, those that this rank uses next too, by (epoch, shard, start,
        stop): numpy takes a third less time for a row where they are masked together.
        """
        rows, order = self.open(epoch, shard).result()
        size, piece = stop - start, self.pieces[shard]
        rounds = max(1, MASKED_TOGETHER // size) if piece.rule else 1
        starts = [start, *(first for later in range(1, rounds) for number, own, first, end in self.order.own_ranges(
            self.next_row + later * self.order.stride, self.skipped_shards)
            if (number, own, end - first) == (epoch, shard, size))]
        chosen = np.concatenate([order[first:first + size] for first in starts])
        rows = with_masks({key: values[chosen] for key, values in rows.items()}, piece,
                          row_keys(self.seed, epoch, shard, chosen))
        return {(epoch, shard, first, first + size): {key: values[number * size:(number + 1) * size]
                                                      for key, values in rows.items()}
                for number, first in enumerate(starts)}

    def count_empty(self, shard: int, input_mask: np.ndarray) -> None:
        """Say once how many rows of a shard hold no token: they take part in batches, and change nothing."""
        if shard not in self.searched:
            self.searched.add(shard)
            empty = int(np.count_nonzero(~input_mask.any(axis=1)))
            if empty:
                piece = self.pieces[shard]
                self.warn(f"{piece.path.parent / piece.name}: {empty} of its {len(input_mask)} rows hold no token and "
                          "are passed over")

    def open(self, epoch: int, shard: int) -> Future:
        if (epoch, shard) not in self.open_shards:
            self.open_shards[epoch, shard] = self.thread.submit(self.read_shuffled, epoch, shard)
        return self.open_shards[epoch, shard]

    def read_shuffled(self, epoch: int, shard: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        piece = self.pieces[shard]
        self.fetcher.wait_for(piece)
        rows = self.reader.call(read_checked_rows, piece, self.vocab_size)
        return rows, row_order(self.seed, epoch, shard, piece.rows)

    def skip_unreadable(self) -> None:
        """Skip the shards of the next round that any rank cannot read.

        All ranks see the same shards in the same order, so that each gather is about the same shard.
        """
        while True:
            unknown = [rows for rows in self.ranges_read(self.next_row) if rows[:2] not in self.readable]
            if not unknown:
                return
            epoch, shard, start, _ = unknown[0]
            faults = self.ranks.gather(self.fault(epoch, shard))
            if any(faults):
                self.skip_shard(epoch, shard, start, next(filter(None, faults)))
            else:
                self.readable.add((epoch, shard))

    def fault(self, epoch: int, shard: int) -> str | None:
        try:
            self.open(epoch, shard).result()
        except UserError as error:
            return str(error)
        return None

    def skip_shard(self, epoch: int, shard: int, start: int, fault: str) -> None:
        """Continue without a shard, of which `start` rows were used in this epoch."""
        self.skipped_shards[shard] = (epoch, start)
        piece = self.pieces[shard]
        if all(number in self.skipped_shards for number, other in enumerate(self.pieces)
               if other.source == piece.source and other.rows):
            raise UserError(f"no readable shard is left{f' of {piece.source}' if piece.source else ''}; the last one: "
                            f"{fault}")
        self.warn(f"skipped from row {self.next_row} of the run on: {'' if piece.whole else f'{piece.name}: '}{fault}")

    def read_ahead(self) -> None:
        """Forget the shards that are used up, and start reading the next ones."""
        rounds = [row for row in self.order.rounds_ahead(self.next_row, self.skipped_shards)
                  if self.last_row is None or row < max(self.last_row, self.next_row + 1)]
        wanted = [rows[:2] for row in rounds for rows in self.ranges_read(row)]
        self.open_shards = {key: future for key, future in self.open_shards.items() if key in wanted}
        self.readable.intersection_update(wanted)
        if set(wanted) != self.fetched_ahead:  # before the next one is opened, so that room is made of what is used up
            self.fetched_ahead = set(wanted)
            self.fetch_ahead()
        for key in wanted:
            self.open(*key)

    def fetch_ahead(self) -> None:
        """Tell the fetcher what the ranks of this server will read."""
        if self.last_row is not None and any(piece.remote for piece in self.pieces):
            ranks, behind = self.ranks.of_this_server, max(0, self.next_row - RANKS_APART * self.order.stride)
            needed, in_use = ([self.pieces[number] for number in self.order.upcoming(*rows, ranks, self.skipped_shards)]
                              for rows in ((self.next_row, self.last_row), (behind, self.next_row)))
            self.fetcher.expect(needed, in_use)

    def ends_at(self, row: int) -> None:
        """Say where the run ends, from which on nothing is read ahead, and begin to fetch what comes before."""
        self.last_row = row
        self.fetch_ahead()

    def finish_reading(self) -> None:
        """Wait until the shards that are read in the background are read, or found to be unreadable."""
        wait(self.open_shards.values())

    def memory(self) -> tuple[int, int]:
        """Bytes of the rows that are read now, and at most until the end that ends_at() was told: of two pieces of each
        source."""
        now, end = (self.order.epochs(row, self.skipped_shards)
                    for row in (self.next_row, max(self.next_row, self.last_row - 1)))
        needed = {}
        for number in self.order.upcoming(self.next_row, self.last_row, range(self.ranks.rank, self.ranks.rank + 1),
                                          self.skipped_shards):
            needed.setdefault(self.pieces[number].source, []).append(self.pieces[number].nbytes)
        return (sum(self.pieces[shard].nbytes for _, shard in self.open_shards),
                sum(sum(sorted(sizes)[-2:]) if now[source] == end[source] else 2 * max(sizes)  # one in two epochs
                    for source, sizes in needed.items()))

    def rows_used(self, batches_ahead: int) -> int:
        """Rows of the endless sequence that were used, where each rank holds this many unused micro-batches."""
        return self.next_row - batches_ahead * self.order.stride

    def state_dict(self, batches_ahead: int) -> dict:
        """The position in the endless sequence, and what its order depends on besides the seed."""
        order = {"order": self.order.state_dict()} if len(self.order.sources) > 1 else {}
        return {"rows": self.rows_used(batches_ahead), **order,
                "shards": {piece.name: piece.rows for piece in self.pieces},
                "skipped_shards": {self.pieces[shard].name: list(position)
                                   for shard, position in self.skipped_shards.items()}}

    def load_state_dict(self, state: dict, source) -> None:
        """Continue from a state_dict, read from the file `source`, with the shards in the pieces that it names.

        A missing shard keeps its place in the order, and is skipped when its turn comes.  UserError where the state is
        malformed, or a shard is missing and may not be skipped.
        """
        what = f"{source}: data"
        self.next_row = whole_number(state, "rows", what)
        self.order.load_state_dict(dictionary(state, "order", what), self.next_row, what)
        rows_then, skipped = (dictionary(state, key, what) for key in ("shards", "skipped_shards"))
        rows_then = {str(name): whole_number(rows_then, name, what) for name in rows_then}
        skipped = {name: position_of(skipped[name], f"{what}: {name}") for name in rows_then if name in skipped}
        if not rows_then:
            return
        rows_of_files = Counter()
        for name, rows in rows_then.items():
            rows_of_files[file_of(name)] += rows
        if any(rows_of_files[shard.file_name] != shard.rows for shard in self.shards):
            self.warn("the shards are not those that the run began with: "
                      "rows of this epoch may be used twice, or not at all")
            return
        pieces = pieces_named(rows_then, rows_of_files, self.shards)
        found = {shard.path for shard in self.shards}
        gone = sorted({piece.path for piece in pieces if piece.path not in found and piece.name not in skipped})
        if gone and not self.skip_bad_shards:
            raise UserError(f"{gone[0]}: the run began with this shard, and now it is gone ({len(gone)} are); "
                            f"put it back, or continue without it by --skip_bad_shards")
        self.pieces = pieces
        self.order.set_pieces(pieces)
        self.skipped_shards = {list(rows_then).index(name): position for name, position in skipped.items()}

    def close(self) -> None:
        self.fetcher.close()
        self.thread.shutdown(cancel_futures=True)


def in_pieces(shards: list[Shard]) -> list[Shard]:
    return [piece for shard in shards for piece in shard.pieces()]


def pieces_named(rows_of_pieces: dict[str, int], rows_of_files: dict[str, int], shards: list[Shard]) -> list[Shard]:
    """The pieces of a state_dict, by their names, in order; also those of files that are not among the shards."""
    by_file = {shard.file_name: shard for shard in shards}
    first_rows, pieces = Counter(), []
    for name, rows in rows_of_pieces.items():
        file = file_of(name)
        shard = by_file.get(file) or missing_shard(file, rows_of_files[file], shards)
        pieces.append(shard.piece(first_rows[file], rows))
        first_rows[file] += rows
    return pieces


def missing_shard(file: str, rows: int, shards: list[Shard]) -> Shard:
    """A shard that a state_dict names and that is gone."""
    source, _, name = file.rpartition("/")
    like = next((shard for shard in shards if shard.source == source), shards[0])
    return replace(like, path=like.path.parent / name, rows=rows, source=source)


def file_of(piece_name: str) -> str:
    return piece_name if piece_name.endswith(SUFFIX) else piece_name.rpartition(ROWS)[0]


def position_of(value, what: str) -> tuple[int, int]:
    """The (epoch, rows) at which a shard was skipped, from a checkpoint."""
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n >= 0 for n in value):
        return tuple(value)
    raise UserError(f"{what} is {repr(value)[:50]}, not the epoch and the row at which it was skipped")


def check_first_rows(shards: list[Shard], vocab_size: int, reader: ShardReader, skip_bad_shards: bool) -> np.ndarray:
    """Check the first shards, so that most mistakes are found before the model is built; of remote ones the first.

    Returns how often each token occurs in them.  (vocab_size,)
    """
    checked, counts = 0, np.zeros(vocab_size, np.int64)
    for shard in in_pieces(shards[:1] if shards[0].remote else shards):
        if checked >= ROWS_CHECKED_FIRST:
            break
        try:
            counts += reader.call(read_checked_counts, shard, vocab_size)
        except UserError:
            if not skip_bad_shards:
                raise
        checked += shard.rows
    return counts


def with_masks(rows: dict[str, np.ndarray], shard: Shard, keys: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of a shard, masked by its rule with a key for each row if they come without masks."""
    return rows | masked(rows, shard.rule, shard.prediction_slots, keys) if shard.rule else rows


def as_batch(rows: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Rows of either form as a batch (see the top of this file)."""
    if "positions" not in rows:
        count, length = rows["input_ids"].shape
        rows = {**rows,
                "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)),
                "next_sentence_positions": np.zeros((count, 1), np.int32),
                "next_sentence_weights": rows["input_mask"].any(axis=1, keepdims=True)}
        if LABELS in rows:
            rows[LABELS] = rows[LABELS].reshape(count, 1)
    return {key: torch.from_numpy(values.astype(np.int32)) for key, values in rows.items()}


def sequences_in(batch: dict[str, torch.Tensor]) -> int:
    """The number of sequences in a batch on the host."""
    return int(batch["next_sentence_weights"].sum())


def batches_once(shards: list[Shard], batch_size: int, vocab_size: int, reader=IN_PROCESS):
    """Every row once, in order, in batches of one size; the last is filled up with empty rows.

    `reader` reads the shards: IN_PROCESS or a ShardReader.
    """
    pending: dict[str, torch.Tensor] | None = None
    with closing(parts_once(shards, batch_size, vocab_size, reader)) as parts:
        for part in parts:
            pending = part if pending is None else {key: torch.cat([pending[key], part[key]]) for key in part}
            if len(pending["input_ids"]) >= batch_size:
                yield {key: values[:batch_size] for key, values in pending.items()}
                pending = {key: values[batch_size:] for key, values in pending.items()}
    if pending is not None and len(pending["input_ids"]):
        missing = batch_size - len(pending["input_ids"])
        yield {key: torch.nn.functional.pad(values, (0, 0, 0, missing)) for key, values in pending.items()}


def parts_once(shards: list[Shard], most_rows: int, vocab_size: int, reader):
    """Every row once, in order, in batches of at most `most_rows`, which do not cross the end of a piece."""
    with closing(ShardFetcher()) as fetcher:
        for number, shard in enumerate(shards):
            fetcher.expect(shards[number:])
            for piece in shard.pieces():
                fetcher.wait_for(piece)
                rows = reader.call(read_checked_rows, piece, vocab_size)
                for start in range(0, piece.rows, most_rows):
                    part = {key: values[start:start + most_rows] for key, values in rows.items()}
                    numbers = piece.first_row + start + np.arange(len(part["input_ids"]))
                    yield as_batch(with_masks(part, piece, row_keys(HELD_OUT_SEED, 0, number, numbers)))


def average_sequences_per_row(shards: list[Shard], reader: ShardReader, skip_bad_shards: bool = False) -> float:
    """1 for unpacked shards; for packed ones from the packer's metadata, or counted if there are none."""
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
    if all(shard.sequences is not None for shard in shards):
        return sum(shard.sequences for shard in shards) / max(sum(shard.rows for shard in shards), 1)
    sequences, rows = 0, 0
    for shard in in_pieces(shards):
        try:
            sequences += reader.call(count_sequences, shard)
            rows += shard.rows
        except UserError:
            if not skip_bad_shards:
                raise
    return sequences / max(rows, 1)
