"""Packing recipes: which lengths share a row, computed from the histogram of the sequence lengths.

A strategy is the lengths of one row's sequences, longest first, for example (300, 212).  A recipe says how many rows
follow each strategy.  `histogram[length]` counts the sequences of that length, so it has row length + 1 entries.
`depth` is the largest number of sequences in a row.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """`rows[strategy]` rows hold sequences of these lengths; `bound` is a lower bound on the rows of any recipe."""

    rows: Counter
    bound: int

    @property
    def row_count(self) -> int:
        return self.rows.total()

    def histogram(self, row_length: int) -> np.ndarray:
        placed = np.zeros(row_length + 1, np.int64)
        for strategy, count in self.rows.items():
            np.add.at(placed, list(strategy), count)
        return placed


def elementary_bound(histogram: np.ndarray, depth: int) -> int:
    """A lower bound on the rows from the number of tokens, of sequences, and of sequences longer than half a row.

    >>> elementary_bound(np.array([0, 0, 0, 0, 0, 5, 0, 0, 0]), depth=3)  # five sequences of 5 in rows of 8
    5
    """
    lengths = np.arange(len(histogram))
    row_length = len(histogram) - 1
    by_tokens = -(-int(histogram @ lengths) // row_length)
    by_count = -(-int(histogram.sum()) // depth)
    alone = int(histogram[lengths * 2 > row_length].sum())
    return max(by_tokens, by_count, alone)


def knapsack(values: np.ndarray, depth: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The greatest value of a row filled up to each number of tokens, with at most `depth` sequences.

    `values[length]` (int64) is the value of one sequence of that length.  Returns the greatest values and, for 1, 2, …
    sequences, the length to choose next for each number of tokens left (0: none); all are (row length + 1,).  Among
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


def reference_index(strategy, row_length: int, depth: int) -> int:
    """The index of a strategy in the list that the reference's packer makes of all of them.

    That list holds, in lexicographic order, every ascending series of at most `depth` lengths that adds up to the row
    length; padding is a length there.  A row of `depth` sequences and padding is not in it: its longest sequence is
    counted with the padding.

    >>> reference_index((5, 1), row_length=8, depth=3)  # with 2 of padding: after (1, 1, 6), before (1, 3, 4)
    1
    """
    lengths, padding = sorted(strategy), row_length - sum(strategy)
    if padding and len(lengths) < depth:
        lengths = sorted([*lengths, padding])
    else:
        lengths[-1] += padding
    table = partitions(row_length, depth)
    index, left, least = 0, row_length, 1
    for place, length in enumerate(lengths):
        for shorter in range(least, length):  # the series that have a shorter length here, by the number of the others
            index += sum(table[count][max(0, left - shorter - count * (shorter - 1))]
                         for count in range(1, depth - place))
        left, least = left - length, length
    return index


@cache
def partitions(row_length: int, depth: int) -> list[list[int]]:
    """table[count][total]: how many ascending series of `count` lengths, each at least 1, add up to the total.

    Either the first length is 1, or 1 can be taken off each.
    """
    table = [[1] + [0] * row_length]
    for count in range(1, depth + 1):
        table.append([0] * (row_length + 1))
        for total in range(count, row_length + 1):
            table[count][total] = table[count - 1][total - 1] + table[count][total - count]
    return table
