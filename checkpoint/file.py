"""One file of a checkpoint: plain values and tensors in PyTorch's format, sealed by a checksum.

PyTorch writes a zip archive.  The seal is its comment (`unzip -z` shows it): "sha256:" and the 64 hex digits of the
archive without comment.  A file that holds the key CHECKSUM but has no seal is damaged; a file with neither was written
by other software and is read unchecked.

Gaudi's software replaces torch.save and torch.load in lazy mode.  Its save copies every tensor, and writes pickle
protocol 4, which only its own load reads.  So the original functions are used here.  Files in protocol 4 are read too.
"""

import hashlib
import inspect
import os
import pickle
import types
import zipfile
from pathlib import Path

import torch

from common.errors import UserError, first_line
from common.files import PatientFile, replacing

CHECKSUM = "checksum"
MARK = b"sha256:"
COMMENT_SIZE = len(MARK) + 64
SEAL_SIZE = 2 + COMMENT_SIZE  # the archive ends in the comment's length, two bytes, and the comment
BLOCK = 1 << 20
PICKLE_PROTOCOL = 2  # the newest one that torch.load(weights_only=True) reads
# What a file in a newer protocol may name: tensors and plain containers.
SAFE_NAMES = {("collections", "OrderedDict"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2"),
              ("torch._utils", "_rebuild_parameter")}


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
    """The contents of a file, on the host.  Nothing in it is executed.

    Raises UserError where there is no such file, where it is damaged, and where it holds no dictionary.
    """
    path = Path(path)
    try:
        sealed = check_seal(path)
        contents = load_archive(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a damaged zip or pickle makes torch.load raise anything
        raise UserError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: not a checkpoint: it holds no dictionary")
    if contents.pop(CHECKSUM, None) is not None and not sealed:
        raise UserError(f"{path}: not a readable checkpoint: its checksum is missing")
    return contents


def load_archive(path: Path):
    """The value that torch.save wrote, its tensors on the host, without executing anything in the file."""
    load = inspect.unwrap(torch.load)
    if pickle_protocol(path) <= PICKLE_PROTOCOL:
        return load(path, map_location="cpu", weights_only=True)
    return load(path, map_location="cpu", weights_only=False,
                pickle_module=types.SimpleNamespace(Unpickler=SafeUnpickler, __name__="pickle"))


def pickle_protocol(path: Path) -> int:
    """The protocol of the pickle in an archive of torch.save; 0 where the file is something else."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        if "data.pkl" not in names or "constants.pkl" in names:  # the latter: a TorchScript program
            return 0
        with archive.open(names["data.pkl"]) as file:
            start = file.read(2)
    return start[1] if start[:1] == pickle.PROTO else 0


class SafeUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers only; a file that names anything else is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) not in SAFE_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a tensor")
        return super().find_class(module, name)


def check_sealed(path: Path) -> None:
    """UserError where a file of write_file is damaged or cannot be read."""
    try:
        sealed = check_seal(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not sealed:
        raise UserError(f"{path}: not a readable checkpoint: its checksum is missing")


def check_seal(path: Path) -> bool:
    """Whether a file has a seal.  UserError where the seal does not match the file."""
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
        raise UserError(f"{path}: not a readable checkpoint: its checksum does not match")
    return True


def is_plain(value) -> bool:
    """Whether a value from a file is a tensor that weights and moments can be copied from."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            and value.is_floating_point())


def check_tensor(value, shape, what: str) -> None:
    """UserError where a value from a file is not a plain tensor of this shape."""
    if not is_plain(value):
        raise UserError(f"{what} is no plain tensor of floating-point numbers")
    if value.shape != shape:
        raise UserError(f"{what} has shape {tuple(value.shape)}, the config makes it {tuple(shape)}")
