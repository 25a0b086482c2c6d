"""Which documents of a text are kept: --min_words, --min_letters and --deduplicate.  No torch here.

The workers filter and hash; the main process compares the hashes, which take 8 bytes for each document kept.  For
--deduplicate near, near_duplicates.py has signatures in place of hashes.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from data.preparation.near_duplicates import SeenSignatures, empty_signature, signatures_of

EXACT, NEAR = "exact", "near"  # values of --deduplicate
HASH_BYTES = 8  # two of 100 million documents have the same hash by chance with a probability of 1 in 3,000


@dataclass(frozen=True, kw_only=True)
class DocumentFilters:
    min_words: int = 0  # words separated by spaces
    min_letters: float = 0.0  # share of letters among the characters that are no spaces
    deduplicate: str | None = None  # a key of DEDUPLICATED, or not

    def options(self) -> dict:
        """The filters that are on, for the record."""
        on = {name: value for name, value in vars(self).items() if value}
        return on | {"deduplicate": True} if self.deduplicate == EXACT else on  # as records of earlier versions say it

    def fingerprints(self, lines: list[str]) -> np.ndarray:
        """What documents are compared by, one a line; nothing where duplicates are kept."""
        fingerprints_of, _ = DEDUPLICATED[self.deduplicate or EXACT]
        return fingerprints_of(lines if self.deduplicate else [])

    def seen(self):
        """A new SeenDocuments or SeenSignatures; None where duplicates are kept."""
        return DEDUPLICATED[self.deduplicate][1]() if self.deduplicate else None

    def check(self) -> None:
        """UserError where a package is missing."""
        self.fingerprints([])
        if self.deduplicate == NEAR:
            empty_signature()

    def fault(self, line: str) -> str | None:
        """The name of the filter that drops this document, as it is counted."""
        if self.min_words and len(line.split()) < self.min_words:
            return "below_min_words"
        if self.min_letters and letter_share(line) < self.min_letters:
            return "below_min_letters"
        return None


def read_filtered(read_batch, filters: DocumentFilters, *task) -> tuple[list[str], dict, list[str], np.ndarray]:
    """What read_batch gives for the task, without the documents that the filters drop, and the others' fingerprints."""
    lines, counts, skipped = read_batch(*task)
    if filters.min_words or filters.min_letters:
        faults = [filters.fault(line) for line in lines]
        dropped = Counter(filter(None, faults))
        lines = [line for line, fault in zip(lines, faults, strict=True) if not fault]
        counts = dict(Counter(counts) + dropped) | {"documents": len(lines)}
    return lines, counts, skipped, filters.fingerprints(lines)


def document_hashes(lines) -> np.ndarray:
    """(documents,) uint64.  Documents that differ in case, white space or Unicode composition only have one hash."""
    digests = [blake2b(normalised(line).encode(), digest_size=HASH_BYTES).digest() for line in lines]
    return np.frombuffer(b"".join(digests), np.uint64)


def document_signatures(lines) -> np.ndarray:
    return signatures_of([normalised(line) for line in lines])


def normalised(line: str) -> str:
    return " ".join(unicodedata.normalize("NFC", line).casefold().split())


class SeenDocuments:
    """The hashes of the documents so far, as sorted arrays; each is at least twice as long as the next."""

    counted_as = "duplicates"

    def __init__(self):
        self.levels: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Which of the hashes are new, of equal ones the first; from now on they are seen."""
        new = np.zeros(len(hashes), bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for level in self.levels:
            place = np.minimum(np.searchsorted(level, hashes), len(level) - 1)
            new &= level[place] != hashes
        if new.any():
            self.levels.append(np.sort(hashes[new]))
        while len(self.levels) > 1 and len(self.levels[-2]) < 2 * len(self.levels[-1]):
            self.levels[-2:] = [np.sort(np.concatenate(self.levels[-2:]))]
        return new


    def keep(self, hashes: np.ndarray) -> None:
        """These documents are seen."""
        self.add(hashes)

    def listed(self, lines: list[str]) -> list[str]:
        """Nothing: what was dropped stands elsewhere in the text."""
        return []


DEDUPLICATED = {EXACT: (document_hashes, SeenDocuments), NEAR: (document_signatures, SeenSignatures)}


def letter_share(line: str) -> float:
    """The share of letters, marks on letters included, among the characters that are no spaces.

    >>> letter_share("Tel. 0123-456")
    0.25
    """
    counts = Counter(line)
    visible = sum(count for character, count in counts.items() if not character.isspace())
    return sum(count for character, count in counts.items() if is_letter(character)) / max(1, visible)


@lru_cache(1 << 16)
def is_letter(character: str) -> bool:
    """Marks are letters too: in Hindi or Thai they are part of a word."""
    return unicodedata.category(character)[0] in "LM"
