"""Greedy packing, longest sequences first: a method of its own (LPFHP), and how the other methods fill whole rows.

LPFHP is longest-pack-first histogram packing (Krell et al., arXiv 2107.02027).
"""

from bisect import bisect_left, bisect_right, insort
from collections import Counter

import numpy as np

from data.packing.recipe import Recipe, elementary_bound


def lpfhp(histogram: np.ndarray, depth: int) -> Recipe:
    return Recipe(longest_pack_first(histogram, depth), elementary_bound(histogram, depth))


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
        index = bisect_left(self.rooms, length)
        if index == len(self.rooms):
            return None
        room = self.rooms[index]
        strategy, count = self.packs[room].pop()
        if count > most:
            self.packs[room].append((strategy, count - most))
        if not self.packs[room]:
            del self.packs[room], self.rooms[index]
        return strategy, min(count, most), room

    def rows(self) -> Counter:
        rows = Counter()
        for packs in self.packs.values():
            for strategy, count in packs:
                rows[strategy] += count
        return rows


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
