"""Packing recipes: which lengths share a row, computed from the histogram of the sequence lengths.

A strategy is the lengths of one row's sequences, longest first, for example (300, 212).  A recipe says how many rows
follow each strategy.  `histogram[length]` counts the sequences of that length, so it has row length + 1 entries.
`depth` is the largest number of sequences in a row.
"""

from collections import Counter
from dataclasses import dataclass

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
