"""One file of a checkpoint: plain values and tensors in PyTorch's format, sealed by a checksum.

PyTorch writes a zip archive.  The seal is its comment (`unzip -z` shows it): "sha256:" and the 64 hex digits of the
archive without comment.  A file that holds the key CHECKSUM but has no seal is damaged; a file with neither was written
by other software and is read unchecked.

Gaudi's software replaces torch.save in lazy mode.  Its save copies every tensor, and writes pickle protocol 4, which
stock torch.load does not read with weights_only=True.  So the original function is used here.  archive.py reads both.
"""

import hashlib
import inspect
import os
from pathlib import Path

import torch

from checkpoint.archive import load_archive
from checkpoint.pickle_reader import Placeholder, RefusedContents, printable
from common.errors import UserError, first_line
from common.files import PatientFile, replacing

CHECKSUM = "checksum"
MARK = b"sha256:"
COMMENT_SIZE = len(MARK) + 64
SEAL_SIZE = 2 + COMMENT_SIZE  # the archive ends in the comment's length, two bytes, and the comment
BLOCK = 1 << 20
PICKLE_PROTOCOL = 2  # the newest one that torch.load(weights_only=True) reads
WAY_OUT = ("nothing of a checkpoint is executed here; in the program that wrote it, save the weights alone: "
           'torch.save({"model": model.state_dict()}, PATH)')


class DamagedFile(UserError):
    """A checkpoint was cut, or its bytes have changed."""


def write_file(path, contents: dict) -> None:
    """Write a file whole or not at all; it is on disk when this returns.  OSError where that fails."""
    with replacing(path) as temporary, HashedFile(temporary, "w+") as file:
        inspect.unwrap(torch.save)({**contents, CHECKSUM: "sha256"}, file, pickle_protocol=PICKLE_PROTOCOL)
        file.seek(-2, os.SEEK_END)
        seal = MARK + file.digest.hexdigest().encode()
        file.write(COMMENT_SIZE.to_bytes(2, "little") + seal)
        if file.failure:
            raise OSError(file.failure.errno, file.failure.strerror, str(path))


class HashedFile(PatientFile):
    """Hashes what is written.  Errors are deferred because PyTorch's archive writer crashes when a write fails."""

    def __init__(self, path, mode: str):
        super().__init__(path, mode)
        self.digest = hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return super().write(data)


def read_file(path) -> dict:
    """The contents of a file, on the host.  Nothing in it is executed: objects become Placeholders (pickle_reader.py).

    UserError where there is no such file, where it holds no dictionary or cannot be read; DamagedFile where it is
    damaged.
    """
    path = Path(path)
    try:
        sealed = check_seal(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    contents = read_archive(path, sealed)
    if not isinstance(contents, dict):
        raise UserError(f"{path}: not a checkpoint: it holds {kind_of(contents)}, not a dictionary; {WAY_OUT}")
    if contents.pop(CHECKSUM, None) is not None and not sealed:
        raise DamagedFile(f"{path}: not a readable checkpoint: its checksum is missing")
    return contents


def read_archive(path, verified: bool = False):
    """The value that torch.save wrote; UserError and DamagedFile as in read_file()."""
    try:
        return load_archive(path, verified)
    except RefusedContents as reason:
        raise UserError(f"{path}: cannot be read: {reason}; {WAY_OUT}") from None
    except MemoryError:
        raise UserError(f"{path}: cannot be read: it does not fit into memory") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # what happens to be raised where bytes are wrong
        kind = "" if isinstance(error, EOFError) or type(error) is ValueError else f"{type(error).__name__}: "
        raise DamagedFile(f"{path}: not a readable checkpoint: {kind}{printable(first_line(error))}") from None


def kind_of(value) -> str:
    """What a value from a file is, for a message: "a list", "an argparse.Namespace"."""
    name = (printable(value.name) + ("" if value.called else " (the class or function)")
            if isinstance(value, Placeholder) else type(value).__name__)
    return f"{'an' if name[:1].lower() in ('a', 'e', 'i', 'o', 'u') else 'a'} {name}"


def check_sealed(path: Path) -> None:
    """UserError where a file of write_file is damaged or cannot be read."""
    try:
        sealed = check_seal(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not sealed:
        raise DamagedFile(f"{path}: not a readable checkpoint: its checksum is missing")


def seal_of(path: Path) -> str:
    """The seal of a file of write_file, as it stands there; "" where there is none."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL_SIZE))
        end = file.read()
    return end[2 + len(MARK):].decode() if end[2:].startswith(MARK) else ""


def check_seal(path: Path) -> bool:
    """Whether a file has a seal.  DamagedFile where the seal does not match the file."""
    rest = max(0, path.stat().st_size - SEAL_SIZE)
    with open(path, "rb") as file:
        file.seek(rest)
        end = file.read()
        if not end.startswith(COMMENT_SIZE.to_bytes(2, "little") + MARK):
            return False
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(min(BLOCK, rest)):
            digest.update(block)
            rest -= len(block)
    digest.update(b"\0\0")  # the length of a comment that was not there yet
    if end[2 + len(MARK):] != digest.hexdigest().encode():
        raise DamagedFile(f"{path}: not a readable checkpoint: its checksum does not match")
    return True


def is_plain(value) -> bool:
    """Whether a value from a file is a tensor that weights and moments can be copied from."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            and value.is_floating_point())


def check_tensor(value, shape, what: str) -> None:
    """UserError where a value from a file is not a plain tensor of this shape."""
    if not is_plain(value):
        raise UserError(f"{what} is {kind_of(value)}, no plain tensor of floating-point numbers")
    if value.shape != shape:
        raise UserError(f"{what} has shape {tuple(value.shape)}, the config makes it {tuple(shape)}")
