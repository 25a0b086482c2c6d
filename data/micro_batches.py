"""Which rows each micro-batch of a training holds: a pure function of seed, sources and micro-batch.  No torch here.

A source is a training set with an endless sequence of rows of its own (row_order.py).  Mixture says which source gives
micro-batch 0, 1, …; a source's rows go to its micro-batches in their order.  A round is one micro-batch for each rank,
and is known by the number of rows before it.  Wherever a number stands for a shard here, a piece of one has its own.
"""

from dataclasses import dataclass, field

import numpy as np

from common.errors import UserError, dictionary, whole_number
from data.mixture import Mixture
from data.row_order import locate, row_ranges, rows_of_epoch
from data.shards import Shard

Skipped = dict[int, tuple[int, int]]  # see row_order.rows_of_epoch


@dataclass(frozen=True)
class SourceRows:
    """The pieces of a source, and how many rows each has."""

    name: str
    pieces: list[int]  # their numbers among those of all sources
    rows: list[int]

    def own(self, skipped: Skipped) -> Skipped:
        """Those of its pieces that are skipped, by their numbers within the source."""
        return {own: skipped[piece] for own, piece in enumerate(self.pieces) if piece in skipped} if skipped else {}

    def rows_left(self, skipped: Skipped, epoch: int, piece: int, stop: int) -> int:
        """The rows of a piece from `stop` on that an epoch uses."""
        return rows_of_epoch(self.rows, self.own(skipped), epoch)[self.pieces.index(piece)] - stop


@dataclass
class MicroBatchOrder:
    """The micro-batches of `world_size` ranks, seen by one of them; `reads_all`: it reads those of all ranks."""

    seed: int
    batch_size: int  # rows of a micro-batch
    rank: int
    world_size: int
    reads_all: bool
    mixture: Mixture
    sources: list[SourceRows] = field(init=False)
    first_row: int = 0  # where micro-batch 0 is: not 0 after a change of the batch size
    rows_before: list[int] = field(init=False)  # of each source, used before that

    def __post_init__(self):
        self.rows_before = [0] * len(self.mixture.parts)

    @property
    def stride(self) -> int:
        """The rows of a round."""
        return self.batch_size * self.world_size

    def set_pieces(self, pieces: list[Shard]) -> None:
        names = list(dict.fromkeys(piece.source for piece in pieces))
        numbers = [[number for number, piece in enumerate(pieces) if piece.source == name] for name in names]
        self.sources = [SourceRows(name, of_source, [pieces[number].rows for number in of_source])
                        for name, of_source in zip(names, numbers, strict=True)]

    def own_number(self, row: int) -> int:
        """The number of this rank's micro-batch in the round that begins at `row`."""
        return (row - self.first_row) // self.batch_size + self.rank

    def source_of(self, row: int) -> int:
        """The number of the source of this rank's micro-batch in a round."""
        return self.mixture.source(self.own_number(row))

    def source_row(self, source: int, number: int) -> int:
        """How many rows of its endless sequence a source has used before a micro-batch."""
        return self.rows_before[source] + int(self.mixture.count(source, number)) * self.batch_size

    def ranges(self, number: int, count: int, skipped: Skipped) -> list[tuple[int, int, int, int]]:
        """The rows of so many micro-batches as ranges (epoch, piece, start, stop), source by source."""
        found = []
        for index, source in enumerate(self.sources):
            first, end = self.source_row(index, number), self.source_row(index, number + count)
            found += [(epoch, source.pieces[own], start, stop) for epoch, own, start, stop in row_ranges(
                self.seed, source.rows, first, end - first, source.own(skipped))]
        return found

    def own_ranges(self, row: int, skipped: Skipped) -> list[tuple[int, int, int, int]]:
        """The rows of this rank in the round that begins at `row`."""
        return self.ranges(self.own_number(row), 1, skipped)

    def ranges_read(self, row: int, skipped: Skipped) -> list[tuple[int, int, int, int]]:
        """The rows whose shards this rank reads for that round."""
        if self.reads_all:
            return self.ranges(self.own_number(row) - self.rank, self.world_size, skipped)
        return self.own_ranges(row, skipped)

    def upcoming(self, row: int, stop: int, ranks: range, skipped: Skipped) -> list[int]:
        """The pieces that these ranks read between two rounds, in the order of need: of each source an epoch at most.

        A piece that is needed twice has its first place.
        """
        begin = self.own_number(row) - self.rank
        end = begin + -(-(stop - row) // self.batch_size)
        first_needs: dict[int, int] = {}
        for index, source in enumerate(self.sources):
            first = self.source_row(index, begin)
            count = min(self.source_row(index, end) - first, sum(source.rows))
            for _, own, start, stop_in_piece in row_ranges(self.seed, source.rows, first, count, source.own(skipped)):
                rows = stop_in_piece - start
                need = self.first_need(index, first, rows, begin, ranks)
                if need is not None:
                    first_needs.setdefault(source.pieces[own], need)
                first += rows
        return sorted(first_needs, key=first_needs.get)

    def first_need(self, source: int, first: int, rows: int, begin: int, ranks: range) -> int | None:
        """The first micro-batch of these ranks among those that so many rows of a source go to; None without one.

        `begin` is a micro-batch of rank 0.
        """
        before, last = (row - self.rows_before[source] for row in (first, first + rows - 1))
        for own in range(before // self.batch_size, last // self.batch_size + 1):
            number = self.mixture.number(source, own)
            if self.reads_all or (number - begin) % self.world_size in ranks:
                return number
        return None

    def epochs(self, row: int, skipped: Skipped) -> dict[str, int]:
        """The epoch of each source, by name, where a round begins."""
        number = self.own_number(row) - self.rank
        return {source.name: locate(source.rows, source.own(skipped), self.source_row(index, number))[0]
                for index, source in enumerate(self.sources)}

    def rounds_ahead(self, row: int, skipped: Skipped) -> list[int]:
        """The rounds whose shards are to be kept or read, in the round that begins at `row`.

        These are, for each source, the next round that needs it, and the first one that reaches beyond the shard which
        is then in use: with many ranks or small shards, this rank may not read the shard that follows.
        """
        rounds = [row, row + self.stride]
        for index, source in enumerate(self.sources):
            now = self.round_with(index, self.own_number(row) - self.rank)
            if now is None:
                continue
            epoch, piece, _, stop = [rows for rows in self.ranges_read(now, skipped) if rows[1] in source.pieces][-1]
            rest = source.rows_left(skipped, epoch, piece, stop) // self.batch_size  # micro-batches of this source
            read_to = self.own_number(now) + (self.world_size - self.rank if self.reads_all else 1)
            used = int(self.mixture.count(index, read_to))
            rounds += [now, self.round_with(index, self.mixture.number(index, used + rest))]
        return list(dict.fromkeys(rounds))

    def round_with(self, source: int, number: int) -> int | None:
        """The first round in which this rank reads a source for a micro-batch with this number or a higher one.

        None where there is none: with as many ranks as micro-batches in a period, a rank always gets the same source.
        """
        earlier = number % self.world_size if self.reads_all else self.rank - (self.rank - number) % self.world_size
        numbers = number - earlier + np.arange(self.mixture.period) * self.world_size
        start, count = (0, self.world_size) if self.reads_all else (self.rank, 1)
        reads = self.mixture.count(source, numbers + start + count) > self.mixture.count(source, numbers + start)
        return self.first_row + int(numbers[reads.argmax()]) * self.batch_size if reads.any() else None

    def state_dict(self) -> dict:
        return {"parts": {source.name: part for source, part in zip(self.sources, self.mixture.parts, strict=True)},
                "batch_size": self.batch_size, "first_row": self.first_row, "rows_before": list(self.rows_before)}

    def load_state_dict(self, state: dict, row: int, what: str) -> None:
        """Go on from a state_dict at `row`; with another batch size, micro-batches are numbered anew from there.

        UserError where the state is malformed or of another mixture.
        """
        own, parts = self.state_dict(), dictionary(state, "parts", what)
        if not parts:  # of one set
            parts, state = {"": 1}, {"batch_size": 1}
        if parts != own["parts"]:
            raise UserError(f"{what}: the run began with the mixture {repr(parts)[:200]}, now it is {own['parts']}: it "
                            f"decides the order of the rows")
        batch_size, first_row = (whole_number(state, key, what) for key in ("batch_size", "first_row"))
        before = state.get("rows_before", [0] * len(parts))
        if not isinstance(before, list) or len(before) != len(parts) or not batch_size > 0 or not first_row <= row:
            raise UserError(f"{what}: the position in its mixture is malformed: {repr(state)[:200]}")
        before = [whole_number({"rows_before": rows}, "rows_before", what) for rows in before]
        if batch_size == self.batch_size and len(parts) > 1:
            self.first_row, self.rows_before = first_row, before
            return
        used = (row - first_row) // batch_size
        self.rows_before = [rows + int(self.mixture.count(source, used)) * batch_size
                            for source, rows in enumerate(before)]
        self.first_row = row
