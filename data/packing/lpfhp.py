"""Longest-pack-first histogram packing (LPFHP, Krell et al., arXiv 2107.02027), and how other methods fill rows."""

from bisect import bisect_right
from collections import Counter
from itertools import chain

import numpy as np

from data.packing.recipe import Recipe, elementary_bound


def lpfhp(histogram: np.ndarray, depth: int) -> Recipe:
    return Recipe(longest_pack_first(histogram, depth), elementary_bound(histogram, depth))


def longest_pack_first(histogram: np.ndarray, depth: int) -> Counter:
    """Place the longest sequences first, each in the fullest row that has room for it.

    >>> longest_pack_first(np.array([0, 0, 4, 1, 1, 0, 1]), depth=3)  # 6; 4 + 2; 3 + 2; 2 + 2
    Counter({(6,): 1, (4, 2): 1, (3, 2): 1, (2, 2): 1})
    """
    row_length = len(histogram) - 1
    rows = Counter()
    unfinished = {}  # room left -> [(strategy, number of rows), ...]
    for length in np.flatnonzero(histogram)[::-1].tolist():
        waiting = int(histogram[length])
        while waiting:
            room = min((room for room in unfinished if room >= length), default=row_length)
            if room < row_length:
                (strategy, available), copies = unfinished[room].pop(), 1
                count = min(available, waiting)
                if available > count:
                    unfinished[room].append((strategy, available - count))
                if not unfinished[room]:
                    del unfinished[room]
            else:
                strategy, copies = (), min(row_length // length, depth, waiting)
                count = waiting // copies
            strategy, room = strategy + (length,) * copies, room - length * copies
            waiting -= count * copies
            if len(strategy) == depth or room == 0:
                rows[strategy] += count
            else:
                unfinished.setdefault(room, []).append((strategy, count))
    for strategy, count in chain.from_iterable(unfinished.values()):
        rows[strategy] += count
    return rows


def fill_rows(strategies: np.ndarray, counts: np.ndarray, histogram: np.ndarray, depth: int) -> Counter:
    """Put all sequences into rows with slots of given lengths: `counts[i]` rows of `strategies[i]` (zero padded).

    A slot takes the longest waiting sequence that fits.  Slots without one stay empty, and sequences without a slot are
    packed longest first.

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
    """For each slot the longest waiting sequence that fits; `lengths` (ascending) are those of waiting sequences."""
    chosen = Counter()
    for slot in slots:
        fit = bisect_right(lengths, slot) - 1
        while fit >= 0 and chosen[lengths[fit]] == waiting[lengths[fit]]:
            fit -= 1
        if slot and fit >= 0:
            chosen[lengths[fit]] += 1
    return chosen
