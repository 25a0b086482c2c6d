"""Fingerprints of the sequences in packed or unpacked rows, and sets of sequences compared by them."""

from dataclasses import dataclass, field

import numpy as np

from data.counter_rng import scrambled
from data.packing.checks import sequence_starts

BUCKETS = 2**16  # fingerprints are compared by the sums of so many groups of them


@dataclass
class SequenceMultiset:
    """Some sequences, any of them more than once: in each bucket of fingerprints, how many there are and their sum."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    sums: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.uint64))  # modulo 2**64

    @classmethod
    def of(cls, rows: dict[str, np.ndarray]) -> "SequenceMultiset":
        """The sequences of sound rows of either form."""
        values = fingerprints(rows)
        buckets, sums = bucket_of(values), np.zeros(BUCKETS, np.uint64)
        np.add.at(sums, buckets, values)
        return cls(np.bincount(buckets, minlength=BUCKETS), sums)

    def __add__(self, other: "SequenceMultiset") -> "SequenceMultiset":
        return SequenceMultiset(self.counts + other.counts, self.sums + other.sums)

    def differs_from(self, other: "SequenceMultiset") -> np.ndarray:
        """The buckets that do not hold the same sequences."""
        return np.flatnonzero((self.counts != other.counts) | (self.sums != other.sums))


def bucket_of(values: np.ndarray) -> np.ndarray:
    """The bucket of each fingerprint: its lowest bits."""
    return (values % np.uint64(BUCKETS)).astype(np.int64)


def fingerprints(rows: dict[str, np.ndarray]) -> np.ndarray:
    """A number for each sequence of sound rows of either form, row by row, (sequences,) uint64.

    Equal sequences have equal numbers, wherever they stand.  It is made of the tokens with their segments and
    positions, the masked tokens with their positions (in any order), and the label.
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
    labels = rows["next_sentence_labels"]
    labels = (labels if labels.ndim == 2 else labels[:, None])[row, mask[row, start] - 1]
    return scrambled(sums + labels.astype(np.uint64))


def hashed(ids: np.ndarray, positions: np.ndarray, kind) -> np.ndarray:
    """A well-mixed number for each id at a position; `kind`, below 8, tells labels and the two segments apart."""
    return scrambled((ids.astype(np.int64) << 32 | positions << 3 | kind).astype(np.uint64))
