"""What the samples of a shard were made with and from: the vocabulary, and the text.  No torch here.

It stands in attributes of every shard's file, packed or not, so that it goes where the file goes:

    vocabulary_sha256, vocabulary_size, vocabulary_lower_case   the identity of the vocabulary
    vocabulary_lines   its tokens, each with a line feed behind it, in UTF-8, compressed by zlib
    sources            names of what the samples were made from, separated by blanks: see source_of_text, source_of

Shards of other programs, and of earlier versions, do not have it.
"""

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from common.errors import UserError
from common.text import open_text
from data.vocabulary import VOCABULARY, Vocabulary, check_size

PREFIX = f"{VOCABULARY}_"
LINES = f"{PREFIX}lines"
SOURCES = "sources"
SOURCE_DIGITS = 16
HASHED_BYTES = 1 << 16  # of each end of a file
READ_BYTES = 1 << 20  # of a text, at a time
MOST_BYTES = 1 << 26  # of the tokens: a few bytes can decompress to any number


@dataclass(frozen=True)
class Origin:
    """The vocabulary and the sources of a shard or, merged, of a set."""

    vocabulary: Vocabulary | None = None
    sources: tuple[str, ...] = ()

    @classmethod
    def of_texts(cls, vocabulary: Vocabulary, texts) -> "Origin":
        return cls(vocabulary, tuple(filter(None, map(source_of_text, texts))))

    def write(self, attributes: h5py.AttributeManager) -> None:
        if self.vocabulary:
            values = self.vocabulary.to_dict()
            lines = values.pop("lines", None)
            attributes.update({f"{PREFIX}{key}": value for key, value in values.items()})
            if lines is not None:  # in HDF5's heap, because the attributes themselves have room for 64 KiB
                packed = np.empty((), object)
                packed[()] = np.frombuffer(zlib.compress(lines.encode()), np.uint8)
                attributes.create(LINES, packed, dtype=h5py.vlen_dtype(np.uint8))
        if self.sources:
            attributes[SOURCES] = " ".join(self.sources)

    @classmethod
    def read(cls, attributes: h5py.AttributeManager, what, with_lines: bool = False) -> "Origin":
        """UserError, with `what`, where an attribute is malformed, and what h5py raises."""
        sources = attributes.get(SOURCES, "")
        sources = tuple(sources.split()) if isinstance(sources, str) else ()
        values = {key: plain(attributes[f"{PREFIX}{key}"]) for key in ("sha256", "size", "lower_case")
                  if f"{PREFIX}{key}" in attributes}
        if "sha256" not in values:
            return cls(None, sources)
        if with_lines and LINES in attributes:
            values["lines"] = read_lines(attributes[LINES], f"{what}: {LINES}")
        return cls(Vocabulary.from_dict(values, f"{what}: {VOCABULARY}"), sources)


UNKNOWN = Origin()


def plain(value):
    """An attribute as Python's own type: h5py gives numpy's numbers and booleans."""
    return value.item() if isinstance(value, np.generic) else value


def read_lines(packed, what: str) -> str:
    try:
        return zlib.decompressobj().decompress(bytes(packed), MOST_BYTES).decode()
    except (zlib.error, ValueError, TypeError) as error:
        raise UserError(f"{what}: not the tokens of a vocabulary ({error})") from None


def source_of_text(path) -> str | None:
    """A name for a text, whatever its path and encoding; None where there is none, or it can be read only once."""
    digest, empty = hashlib.sha256(), hashlib.sha256().digest()
    if not Path(path).is_file():
        return None
    try:
        with open_text(path, errors="replace") as file:
            while lines := file.readlines(READ_BYTES):
                digest.update("".join(f"{line}\n" for line in map(str.strip, lines) if line).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return None if digest.digest() == empty else digest.hexdigest()[:SOURCE_DIGITS]


def source_of(path) -> str:
    """A name for a file, whatever its path: from its size and both its ends."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            beginning = file.read(HASHED_BYTES)
            file.seek(max(0, size - HASHED_BYTES))
            return source_of_ends(size, beginning, file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def source_of_ends(size: int, beginning: bytes, end: bytes) -> str:
    """The same from the first and the last HASHED_BYTES of a file."""
    return hashlib.sha256(b"%d " % size + beginning + end).hexdigest()[:SOURCE_DIGITS]


def known_sources(shards) -> list[str]:
    """What the shards say that they were made from."""
    return sorted({source for shard in shards for source in shard.origin.sources})


def sources_of(shards) -> set[str]:
    """What a set was made from; a shard that does not say it stands for itself."""
    return {source for shard in shards
            for source in shard.origin.sources or (shard.fingerprint or source_of(shard.path),)}


def held_from_training(held_out, trained: set[str]) -> Path | None:
    """The first held-out shard that is, or was made from, one of the sources that were trained on; None without one."""
    return next((shard.path for shard in held_out if not trained.isdisjoint(sources_of([shard]))), None)


def vocabulary_of(shards):
    """The vocabulary of a set, as far as a shard says it, and that shard; (None, None) where none does."""
    return next(((shard.origin.vocabulary, shard) for shard in shards if shard.origin.vocabulary), (None, None))


def check_vocabulary(shards, vocab_size: int) -> Vocabulary | None:
    """The vocabulary of a set; UserError where it is not of the model's size."""
    vocabulary, shard = vocabulary_of(shards)
    if vocabulary:
        check_size(vocabulary.size, vocab_size, f"{shard.path}, its vocabulary")
    return vocabulary
