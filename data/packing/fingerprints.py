"""Fingerprints of the sequences in packed or unpacked rows, and sums of them by which two sets are compared."""

import numpy as np

from data.counter_rng import scrambled
from data.packing.checks import sequence_starts
from data.shards import LABELS

BUCKETS = 2**16  # groups of fingerprints whose sums are compared


def bucket_of(values: np.ndarray) -> np.ndarray:
    """The bucket of each fingerprint: its lowest bits."""
    return (values % np.uint64(BUCKETS)).astype(np.int64)


def bucket_sums(values: np.ndarray) -> np.ndarray:
    """How many fingerprints each bucket holds, and their sum modulo 2**64, (2, BUCKETS) uint64.

    Arrays of parts of a set add up to that of the set; where two sets differ, so do their arrays.
    """
    sums = np.zeros((2, BUCKETS), np.uint64)
    sums[0] = np.bincount(bucket_of(values), minlength=BUCKETS)
    np.add.at(sums[1], bucket_of(values), values)
    return sums


def sequence_fingerprints(rows: dict[str, np.ndarray]) -> np.ndarray:
    """A number for each sequence of valid rows of either form, row by row, (sequences,) uint64.

    It depends on everything in the sequence, but not on its place in the set or on the order of the masked tokens.
    """
    mask = rows["input_mask"].astype(np.int64)
    starts, real = sequence_starts(mask), mask != 0
    row, start = np.nonzero(starts)  # of each sequence
    sequence = np.cumsum(starts[real]) - 1  # of each token
    position = np.nonzero(real)[1] - start[sequence]
    tokens = hashed(rows["input_ids"][real], position, 2 + rows["segment_ids"][real].astype(np.int64))
    sums = np.add.reduceat(tokens, np.flatnonzero(starts[real]))

    if "masked_lm_positions" in rows:
        masked_row, slot = np.nonzero(rows["masked_lm_positions"])
        offset = rows["masked_lm_positions"][masked_row, slot].astype(np.int64)
        counts = np.count_nonzero(starts, axis=1)
        sequence = (np.cumsum(counts) - counts)[masked_row] + mask[masked_row, offset] - 1
        np.add.at(sums, sequence, hashed(rows["masked_lm_ids"][masked_row, slot], offset - start[sequence], 1))
    if LABELS not in rows:
        return scrambled(sums)
    labels = rows[LABELS]
    labels = (labels if labels.ndim == 2 else labels[:, None])[row, mask[row, start] - 1]
    return scrambled(sums + labels.astype(np.uint64))


def hashed(ids: np.ndarray, positions: np.ndarray, kind) -> np.ndarray:
    """A hash of each id at its position; `kind` (below 8) distinguishes labels and the two segments."""
    return scrambled((ids.astype(np.int64) << 32 | positions << 3 | kind).astype(np.uint64))
