"""What the samples of a shard were made with and from: the vocabulary, and the text.  No torch here.

It stands in attributes of every shard's file, packed or not, so that it goes where the file goes:

    vocabulary_sha256, vocabulary_size, vocabulary_lower_case   the identity of the vocabulary
    vocabulary_lines   its tokens, each with a line feed behind it, in UTF-8, compressed by zlib
    texts              names of what the samples were made from, separated by blanks: see text_name, content_name

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
TEXTS = "texts"
NAME_DIGITS = 16
HASHED_BYTES = 1 << 16  # of each end of a file
READ_BYTES = 1 << 20  # of a text, at a time
MOST_IN_ATTRIBUTE = 60_000  # bytes: HDF5 allows 64 KiB with what describes them
MOST_BYTES = 1 << 26  # of the tokens: a few bytes can decompress to any number


@dataclass(frozen=True)
class Origin:
    """The vocabulary and the texts of a shard or, merged, of a set."""

    vocabulary: Vocabulary | None = None
    texts: tuple[str, ...] = ()

    @classmethod
    def of_texts(cls, vocabulary: Vocabulary, texts) -> "Origin":
        return cls(vocabulary, tuple(filter(None, map(text_name, texts))))

    def write(self, attributes: h5py.AttributeManager) -> None:
        if self.vocabulary:
            values = self.vocabulary.to_dict()
            lines = values.pop("lines", None)
            attributes.update({f"{PREFIX}{key}": np.bytes_(value) if key == "sha256" else value
                               for key, value in values.items()})
            if lines is not None:
                write_bytes(attributes, LINES, zlib.compress(lines.encode()))
        if self.texts:
            write_bytes(attributes, TEXTS, " ".join(self.texts).encode())

    @classmethod
    def read(cls, attributes: h5py.AttributeManager, what, with_lines: bool = False) -> "Origin":
        """UserError, with `what`, where an attribute is malformed, and what h5py raises."""
        texts = tuple(read_bytes(attributes, TEXTS).decode("ascii", "replace").split())
        values = {key: plain(attributes[f"{PREFIX}{key}"]) for key in ("sha256", "size", "lower_case")
                  if f"{PREFIX}{key}" in attributes}
        if "sha256" not in values:
            return cls(None, texts)
        if with_lines and LINES in attributes:
            values["lines"] = read_lines(read_bytes(attributes, LINES), f"{what}: {LINES}")
        return cls(Vocabulary.from_dict(values, f"{what}: {VOCABULARY}"), texts)


UNKNOWN = Origin()


def plain(value):
    """An attribute as Python's own type: h5py gives numpy's numbers, booleans and bytes."""
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def write_bytes(attributes: h5py.AttributeManager, key: str, data: bytes) -> None:
    """In the attribute itself, or where it has no room for that in HDF5's heap, which takes 4 KiB at least."""
    if len(data) < MOST_IN_ATTRIBUTE:
        attributes[key] = np.void(data)
        return
    value = np.empty((), object)
    value[()] = np.frombuffer(data, np.uint8)
    attributes.create(key, value, dtype=h5py.vlen_dtype(np.uint8))


def read_bytes(attributes: h5py.AttributeManager, key: str) -> bytes:
    """What write_bytes has written; nothing where another program gave the name to something else."""
    value = attributes.get(key)
    return value.tobytes() if isinstance(value, np.void) or getattr(value, "dtype", None) == np.uint8 else b""


def read_lines(packed: bytes, what: str) -> str:
    try:
        return zlib.decompressobj().decompress(packed, MOST_BYTES).decode()
    except (zlib.error, ValueError) as error:
        raise UserError(f"{what}: not the tokens of a vocabulary ({error})") from None


def text_name(path) -> str | None:
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
    return None if digest.digest() == empty else digest.hexdigest()[:NAME_DIGITS]


def content_name(path) -> str:
    """A name for a file, whatever its path: from its size and both its ends."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            beginning = file.read(HASHED_BYTES)
            file.seek(max(0, size - HASHED_BYTES))
            return name_of_ends(size, beginning, file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def name_of_ends(size: int, beginning: bytes, end: bytes) -> str:
    """The same from the first and the last HASHED_BYTES of a file."""
    return hashlib.sha256(b"%d " % size + beginning + end).hexdigest()[:NAME_DIGITS]


def known_texts(shards) -> list[str]:
    """What the shards say that they were made from."""
    return sorted({text for shard in shards for text in shard.origin.texts})


def texts_of(shards) -> set[str]:
    """What a set was made from; a shard that does not say it stands for itself."""
    return {text for shard in shards for text in shard.origin.texts or (shard.fingerprint or content_name(shard.path),)}


def held_from_training(held_out, trained: set[str]) -> Path | None:
    """The first held-out shard that is, or was made from, one of the texts that were trained on; None without one."""
    return next((shard.path for shard in held_out if not trained.isdisjoint(texts_of([shard]))), None)


def vocabulary_of(shards):
    """The vocabulary of a set, as far as a shard says it, and that shard; (None, None) where none does."""
    return next(((shard.origin.vocabulary, shard) for shard in shards if shard.origin.vocabulary), (None, None))


def check_vocabulary(shards, vocab_size: int) -> Vocabulary | None:
    """The vocabulary of a set; UserError where it is not of the model's size."""
    vocabulary, shard = vocabulary_of(shards)
    if vocabulary:
        check_size(vocabulary.size, vocab_size, f"{shard.path}, its vocabulary")
    return vocabulary
