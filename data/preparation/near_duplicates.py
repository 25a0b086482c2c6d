"""Documents that are nearly the same: MinHash signatures, and which of them resemble an earlier one.  No torch here.

A document is the set of its runs of SHINGLE words; the share that two sets have in common (of their union) is how much
the documents resemble each other.  datasketch computes signatures, whose places agree with the probability of that
share.  Documents that agree in all places of a band are compared in all places (Broder 1997; Leskovec, Rajaraman and
Ullman 2014, chapter 3).  Of two that share SIMILAR of their runs, 95 % are compared, and 99 % at 0.85.

The workers compute signatures; the main process keeps them: 320 bytes for each document kept, and for a moment up to
0.8 kB.  (datasketch's own index takes several times as much.)
"""

from functools import cache

import numpy as np

from common.errors import UserError
from data.counter_rng import scrambled

SHINGLE = 3  # words
CHARACTERS_PER_WORD = 15  # more are a script without spaces, of which each character stands for a word
PLACES = 128  # of a signature
BANDS = 16
SIMILAR = 0.8  # share of equal places from which on a document is dropped
CHUNK = 1 << 16  # documents whose signatures are kept in one array
LISTED_CHARACTERS = 100  # of a dropped document


@cache
def empty_signature():
    """datasketch's MinHash of nothing, to be copied.  UserError where the package is missing."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise UserError("--deduplicate near: needs datasketch, which is not installed (pip install datasketch)") \
            from None
    return MinHash(num_perm=PLACES, seed=1)


def signatures_of(documents: list[str]) -> np.ndarray:
    """(documents, PLACES) uint32, of normalised documents"""
    signatures = np.empty((len(documents), PLACES), np.uint32)
    for row, document in enumerate(documents):
        minhash = empty_signature().copy()
        minhash.update_batch([shingle.encode() for shingle in shingles(document)])
        signatures[row] = minhash.hashvalues
    return signatures


def shingles(document: str) -> set[str]:
    """The runs of words; the whole of a document that has fewer.

    >>> sorted(shingles("the old ship sails")), sorted(shingles("the ship"))
    (['old ship sails', 'the old ship'], ['the ship'])
    """
    words = document.split()
    if len(document) > CHARACTERS_PER_WORD * len(words):
        words = list(document.replace(" ", ""))
    runs = {" ".join(run) for run in zip(*(words[start:] for start in range(SHINGLE)), strict=False)}
    return runs or {" ".join(words)}


def band_keys(signatures: np.ndarray) -> np.ndarray:
    """A hash of each band of each signature.  (documents, BANDS) uint64"""
    bands = signatures.reshape(len(signatures), BANDS, -1).astype(np.uint64)
    keys = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), bands.shape[:2])
    for place in range(bands.shape[2]):
        keys = scrambled(keys ^ bands[:, :, place])
    return keys


class SeenSignatures:
    """The signatures of the documents kept so far, by one byte a place, and their band keys.

    The keys are sorted arrays, each at least twice as long as the next; of documents with a key in common, an array
    has the first.
    """

    counted_as = "near_duplicates"

    def __init__(self):
        self.count = 0
        self.chunks: list[np.ndarray] = []
        self.levels: list[tuple[np.ndarray, np.ndarray]] = []  # keys, and the number of a document for each
        self.resembling: dict[int, tuple[float, int]] = {}  # row of the last batch → share, number of the kept document

    def add(self, signatures: np.ndarray) -> np.ndarray:
        """Which of the documents do not resemble one that is kept; from now on they are kept."""
        keys, short = band_keys(signatures), signatures.astype(np.uint8)
        earlier, kept, in_batch, self.resembling = self.candidates(keys), [], {}, {}
        for row, own_keys in enumerate(keys.tolist()):
            numbers = earlier[row] | {in_batch[key] for key in own_keys if key in in_batch}
            match = max(((self.share(short, row, kept, number), -number) for number in numbers), default=(0.0, 0))
            if match[0] >= SIMILAR:
                self.resembling[row] = match[0], -match[1]
                continue
            for key in own_keys:
                in_batch.setdefault(key, self.count + len(kept))
            kept.append(row)
        self.keep(signatures[kept])
        new = np.zeros(len(signatures), bool)
        new[kept] = True
        return new

    def candidates(self, keys: np.ndarray) -> list[set[int]]:
        """For each document, the numbers of those kept that have a band key in common with it."""
        found = [set() for _ in keys]
        for level, numbers in self.levels:
            place = np.minimum(np.searchsorted(level, keys), len(level) - 1)
            for row, band in zip(*np.nonzero(level[place] == keys), strict=True):
                found[row].add(int(numbers[place[row, band]]))
        return found

    def share(self, short: np.ndarray, row: int, kept: list[int], number: int) -> float:
        """The share of equal places of a row of this batch and of a document, kept before or of this batch too."""
        other = short[kept[number - self.count]] if number >= self.count else \
            self.chunks[number // CHUNK][number % CHUNK]
        return float((short[row] == other).mean())

    def keep(self, signatures: np.ndarray) -> None:
        """Keep these documents, whatever they resemble."""
        numbers = np.arange(self.count, self.count + len(signatures), dtype=np.uint32)
        for number, signature in zip(numbers.tolist(), signatures.astype(np.uint8), strict=True):
            if number % CHUNK == 0:
                self.chunks.append(np.empty((CHUNK, PLACES), np.uint8))
            self.chunks[-1][number % CHUNK] = signature
        self.count += len(signatures)
        if len(signatures):
            self.levels.append(first_of_each(band_keys(signatures).ravel(), np.repeat(numbers, BANDS)))
        while len(self.levels) > 1 and len(self.levels[-2][0]) < 2 * len(self.levels[-1][0]):
            self.levels[-2:] = [first_of_each(*map(np.concatenate, zip(*self.levels[-2:], strict=True)))]

    def listed(self, lines: list[str]) -> list[str]:
        """A line for each document of the last batch that resembles one kept: their share, that one's number, and how
        the document begins.
        """
        return [f"{share:.2f}\t{number + 1}\t{lines[row][:LISTED_CHARACTERS]}"
                for row, (share, number) in self.resembling.items()]


def first_of_each(keys: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys in order, each once, with the first of its numbers."""
    keys, first = np.unique(keys, return_index=True)
    return keys, numbers[first]
