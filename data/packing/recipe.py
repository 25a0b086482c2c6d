"""Packing recipes: which lengths share a row, worked out from the histogram of the sequence lengths alone.

A strategy is the lengths of one row's sequences, longest first, for example (300, 212).  A recipe says how many rows
follow each strategy.  `histogram[length]` counts the sequences of that length, so it has row length + 1 entries;
`depth` is the most sequences a row may hold.  Nothing here touches a file.
"""

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """`rows[strategy]` rows hold sequences of these lengths; no recipe at all needs fewer rows than `bound`."""

    rows: Counter
    bound: int

    @property
    def row_count(self) -> int:
        return self.rows.total()

    def histogram(self, row_length: int) -> np.ndarray:
        """How many sequences of each length the recipe places."""
        placed = np.zeros(row_length + 1, np.int64)
        for strategy, count in self.rows.items():
            np.add.at(placed, list(strategy), count)
        return placed


def elementary_bound(histogram: np.ndarray, depth: int) -> int:
    """The fewest rows that the number of tokens, of sequences, and of sequences too long to share a row allow.

    >>> elementary_bound(np.array([0, 0, 0, 0, 0, 5, 0, 0, 0]), depth=3)  # five sequences of 5 in rows of 8
    5
    """
    lengths = np.arange(len(histogram))
    row_length = len(histogram) - 1
    by_tokens = -(-int(histogram @ lengths) // row_length)
    by_count = -(-int(histogram.sum()) // depth)
    alone = int(histogram[lengths * 2 > row_length].sum())
    return max(by_tokens, by_count, alone)


def longest_pack_first(histogram: np.ndarray, depth: int) -> Counter:
    """Place the longest sequences first, each in the fullest row that still takes it (LPFHP, Krell et al., 2022).

    All sequences of a length are placed at once, so the time depends on the row length and not on the number of
    sequences.

    >>> longest_pack_first(np.array([0, 0, 4, 1, 1, 0, 1]), depth=3)  # 6; 4 + 2; 3 + 2; 2 + 2
    Counter({(6,): 1, (4, 2): 1, (3, 2): 1, (2, 2): 1})
    """
    row_length = len(histogram) - 1
    finished, unfinished = Counter(), OpenRows()
    for length in np.flatnonzero(histogram)[::-1].tolist():
        waiting = int(histogram[length])
        while waiting:
            found = unfinished.take(length, waiting)
            if found:
                strategy, count, room = found
                copies = 1
            else:
                strategy, room = (), row_length
                copies = min(row_length // length, depth, waiting)
                count = waiting // copies
            strategy, room = strategy + (length,) * copies, room - length * copies
            waiting -= count * copies
            if len(strategy) == depth or room == 0:
                finished[strategy] += count
            else:
                unfinished.add(strategy, count, room)
    return finished + unfinished.rows()


class OpenRows:
    """Rows that can take another sequence, by the room left in them."""

    def __init__(self):
        self.packs = {}  # room left -> [(strategy, number of rows), ...]
        self.rooms = []  # the keys of `packs`, ascending

    def add(self, strategy: tuple[int, ...], count: int, room: int) -> None:
        if room not in self.packs:
            self.packs[room] = []
            insort(self.rooms, room)
        self.packs[room].append((strategy, count))

    def take(self, length: int, most: int) -> tuple[tuple[int, ...], int, int] | None:
        """Remove up to `most` of the fullest rows with room for `length`: their strategy, number and room."""
        place = bisect_left(self.rooms, length)
        if place == len(self.rooms):
            return None
        room = self.rooms[place]
        strategy, count = self.packs[room].pop()
        if count > most:
            self.packs[room].append((strategy, count - most))
        if not self.packs[room]:
            del self.packs[room], self.rooms[place]
        return strategy, min(count, most), room

    def rows(self) -> Counter:
        rows = Counter()
        for packs in self.packs.values():
            for strategy, count in packs:
                rows[strategy] += count
        return rows


def knapsack(values: np.ndarray, depth: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The greatest value of a row filled up to each number of tokens, with at most `depth` sequences.

    `values[length]` (int64) is what one sequence of that length is worth.  Returns the values, (row length + 1,), and
    for 1, 2, … sequences the length to choose next with so much room, each (row length + 1,); 0 stands for none.  Among
    equals the longest is chosen.  The list ends early where more sequences add nothing.

    >>> knapsack(np.array([0, 0, 3, 4, 0, 0]), depth=2)[0]  # 2 + 3 tokens hold 3 + 4
    array([0, 0, 3, 4, 6, 7])
    """
    row_length = len(values) - 1
    best, choices = np.zeros_like(values), []
    for _ in range(depth):
        padded = np.concatenate([np.full(row_length, np.iinfo(values.dtype).min // 2), best])
        totals = np.lib.stride_tricks.sliding_window_view(padded, row_length + 1) + values[::-1]
        choice = totals.argmax(axis=1)  # column k: a sequence of length row_length - k, then the best of what is left
        before, best = best, totals[np.arange(row_length + 1), choice]
        choices.append(row_length - choice)
        if (best == before).all():
            break
    return best, choices


def fill_rows(strategies: np.ndarray, counts: np.ndarray, histogram: np.ndarray, depth: int) -> Counter:
    """Put real sequences into rows with slots of given lengths: `counts[i]` rows of `strategies[i]` (zero padded).

    A slot takes the longest waiting sequence that fits.  Slots that find none stay empty, and sequences that find no
    slot are packed longest first.  All `histogram` counts, and no more, end in the rows returned.

    >>> fill_rows(np.array([[4, 4]]), np.array([2]), np.array([0, 0, 0, 2, 3, 0, 0, 0, 0]), depth=2)
    Counter({(4, 4): 1, (4, 3): 1, (3,): 1})
    """
    waiting = histogram.copy()
    lengths = np.flatnonzero(waiting).tolist()  # ascending
    rows = Counter()
    for slots, count in zip(strategies.tolist(), counts.astype(np.int64).tolist(), strict=True):
        while count:
            chosen = longest_fitting(slots, waiting, lengths)
            if not chosen:
                break
            taken = min(count, *(int(waiting[length]) // copies for length, copies in chosen.items()))
            count -= taken
            rows[tuple(sorted(chosen.elements(), reverse=True))] += taken
            for length, copies in chosen.items():
                waiting[length] -= taken * copies
                if not waiting[length]:
                    lengths.remove(length)
    return rows + longest_pack_first(waiting, depth)


def longest_fitting(slots: list[int], waiting: np.ndarray, lengths: list[int]) -> Counter:
    """For each slot the longest waiting sequence that fits it; `lengths` (ascending) are those with any waiting."""
    chosen = Counter()
    for slot in slots:
        fit = bisect_right(lengths, slot) - 1
        while fit >= 0 and chosen[lengths[fit]] == waiting[lengths[fit]]:
            fit -= 1
        if slot and fit >= 0:
            chosen[lengths[fit]] += 1
    return chosen


def by_longest_pack_first(histogram: np.ndarray, depth: int) -> Recipe:
    return Recipe(longest_pack_first(histogram, depth), elementary_bound(histogram, depth))
