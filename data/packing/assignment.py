"""Which row of the packed set, and which slot in it, every sequence goes to.

That is a pure function of the seed, the sequence's length, and its rank among the sequences of that length in the order
of the input.  So any process can compute it, without a table of all sequences.
"""

import numpy as np

from data.counter_rng import scrambled
from data.masking import ranges
from data.packing.recipe import Recipe


class RowAssignment:
    """The recipe's slots, assigned pseudo-randomly among the sequences of equal length."""

    def __init__(self, recipe: Recipe, histogram: np.ndarray, seed: int):
        strategies = sorted(recipe.rows)
        counts = np.array([recipe.rows[strategy] for strategy in strategies])
        first_rows = np.cumsum(counts) - counts
        runs = [(length, first_row, slot, count)  # `count` slots of this length, in consecutive rows
                for strategy, first_row, count in zip(strategies, first_rows, counts, strict=True)
                for slot, length in enumerate(strategy)]
        lengths, self.run_rows, self.run_slots, run_counts = np.array(sorted(runs)).T
        assert (np.bincount(lengths, run_counts, len(histogram)) == histogram).all(), "the recipe drops a sequence"
        self.run_ends = np.cumsum(run_counts)
        self.run_starts = self.run_ends - run_counts
        self.histogram = histogram
        self.first_slots = np.cumsum(histogram) - histogram
        self.row_count = int(counts.sum())
        self.slot_seed, self.row_seed = np.random.SeedSequence(seed).spawn(2)

    def rows_and_slots(self, lengths: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the shuffled output, and the slots in them, of the sequences with these lengths and ranks."""
        slots = self.first_slots[lengths] + shuffled(ranks, self.histogram[lengths], self.slot_seed)
        runs = np.searchsorted(self.run_ends, slots, side="right")
        rows = self.run_rows[runs] + slots - self.run_starts[runs]
        return shuffled(rows, self.row_count, self.row_seed), self.run_slots[runs]


def shuffled(indices: np.ndarray, size, seed: np.random.SeedSequence) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) puts `indices`; `size` may differ from index to index.

    A Feistel network over the smallest even number of bits that holds `size`, applied again where the result is not
    below `size` (cycle walking).  Unlike a shuffled array it takes no memory, however many rows there are.
    """
    keys = seed.generate_state(6, np.uint64)
    size = np.broadcast_to(np.asarray(size, np.uint64), indices.shape)
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    half_bits = ((bits + 1) // 2).astype(np.uint64)
    targets = indices.astype(np.uint64)
    walking = np.arange(len(targets))
    while len(walking):
        targets[walking] = feistel(targets[walking], half_bits[walking], keys)
        walking = walking[targets[walking] >= size[walking]]
    return targets.astype(np.int64)


def feistel(values: np.ndarray, half_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of 2 * half_bits bits."""
    low_bits = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & low_bits
    for key in keys:
        left, right = right, left ^ (scrambled(right ^ key) & low_bits)
    return (left << half_bits) | right


def ranks_within(lengths: np.ndarray) -> np.ndarray:
    """The rank of each sequence among those of its length.

    >>> ranks_within(np.array([7, 5, 7, 7, 5]))
    array([0, 0, 1, 2, 1])
    """
    order = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths)
    ranks = np.empty_like(order)
    ranks[order] = ranges(np.zeros_like(counts), counts)
    return ranks
