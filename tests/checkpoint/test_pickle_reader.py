"""What a pickle of a few bytes can ask for: lengths, depth and numbers of values that would take all memory or time."""

import io
import resource
import struct
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from checkpoint import pickle_reader
from checkpoint.archive import Records, Values, load_archive
from checkpoint.pickle_reader import PickleReader, Placeholder, RefusedContents
from tools.malformed_pickles import called, named, plain


@contextmanager
def at_most(more: int):
    """A block in which this process can get only so many bytes more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read(program: bytes):
    found = PickleReader(io.BytesIO(program), len(program)).load()
    return Values(Records(None, 0, True)).of(found)


@pytest.mark.parametrize("program", [
    b"X" + struct.pack("<I", 2**32 - 1), b"\x8d" + struct.pack("<Q", 2**62), b"\x8e" + struct.pack("<Q", 2**40),
    b"\x96" + struct.pack("<Q", 2**40), b"B" + struct.pack("<I", 2**31), b"\x8b" + struct.pack("<I", 2**31)])
def test_no_length_is_taken_that_the_file_does_not_have(program):
    with at_most(200 << 20), pytest.raises(EOFError, match="it ends .* bytes early"):
        read(program + b"some bytes.")


def test_a_memo_of_four_billion_places_is_as_small_as_what_is_in_it():
    with at_most(200 << 20):
        assert read(b"Nr" + struct.pack("<I", 2**32 - 1) + b"0j" + struct.pack("<I", 2**32 - 1) + b".") is None


@pytest.mark.parametrize("program, depth", [(b"]" * 50_000 + b"a" * 49_999, 101), (b")" + b"\x85" * 50_000, 101)])
def test_what_is_nested_deeper_than_any_checkpoint_stays_unread(program, depth):
    found, levels = read(program + b"."), 0
    while isinstance(found, list | tuple):
        (found,), levels = found, levels + 1
    assert levels == depth and "in more than 100 others" in repr(found)


def test_a_container_that_holds_itself_stays_unread_there():
    (inner,) = read(b"]q\x00h\x00a.")
    assert isinstance(inner, Placeholder) and repr(inner) == "list that contains itself"


@pytest.mark.parametrize("program, reason", [
    (b"]" + b"".join(b"q%c(h%ch%cl" % (n, n, n) for n in range(90)), "hold one another too many times"),
    (b"})" + b"\x85" * 100_000 + b"Ns", "keys that are nested or very large"),
    (b"}\x8a\x09" + (2**64).to_bytes(9, "little") + b"Ns", "keys that are nested or very large"),
    (b"I7\n", "the operation b'I', which torch.save does not write"),
])
def test_what_would_take_all_memory_or_time_is_refused(program, reason):
    with at_most(1 << 30), pytest.raises(RefusedContents, match=reason):
        read(program + b".")


@pytest.mark.parametrize("operation, most", [(b"}", 2_000_000), (b"\x8f", 2_000_000), (b"N", 20_000_000)])
def test_the_number_of_values_is_limited_by_the_memory_that_they_take(monkeypatch, operation, most):
    """Counted with a limit of a thousandth."""
    assert pickle_reader.MOST_VALUES == 20_000_000
    monkeypatch.setattr(pickle_reader, "MOST_VALUES", 20_000)
    read(operation * (most // 1000) + b".")
    with pytest.raises(RefusedContents, match="it holds more than"):
        read(operation * (most // 1000 + 1) + b".")


def tensor(key: str, size: tuple, stride: tuple = (1,), offset: int = 0) -> bytes:
    """The program of a tensor as torch.save writes it."""
    storage = b"(" + plain("storage") + named("torch", "FloatStorage") + plain(key) + plain("cpu") + plain(1000) + b"tQ"
    view = plain(offset) + plain(size) + plain(stride) + plain(False) + plain({})
    return called(named("torch._utils", "_rebuild_tensor_v2"), b"(" + storage + view + b"t")


@pytest.mark.parametrize("program, error", [
    (tensor("0", (1000,)), None), (tensor("0", (10, 100), (0, 1)), None), (tensor("0", (1001,)), "out of bounds"),
    (tensor("0", (2,), (1,), 999), "out of bounds"), (tensor("0", (10**12,)), "bounds|overflow"),
    (tensor("0", (-5,)), "negative|overflow"), (tensor("beyond", (5,)), "more than its 4000 bytes"),
    (b"(" + tensor("0", (5,)) + tensor("same", (5,)) + b"t", "more than its 4000 bytes"),
    (tensor("none", (5,)), "none"),
])
def test_tensors_lie_within_the_file_and_take_no_more_than_it(program, error):
    places = {"0": (0, 4000, 0), "same": (0, 4000, 0), "beyond": (3996, 8, 0)}
    values = Values(Records(io.BytesIO(bytes(4000)), 4000, False, places))
    found = PickleReader(io.BytesIO(program + b"."), len(program) + 1).load()
    with at_most(200 << 20), nullcontext() if error is None else pytest.raises(Exception, match=error):
        assert values.of(found).dtype == torch.float32


def test_one_number_that_is_a_tensor_of_a_trillion_stays_unread():
    program = tensor("0", (10**12,), (0,)) + b"."
    values = Values(Records(io.BytesIO(bytes(4000)), 4000, False, {"0": (0, 4000, 0)}))
    assert isinstance(values.of(PickleReader(io.BytesIO(program), len(program)).load()), Placeholder)


@pytest.mark.parametrize("dtype", ["b1", "i1", ">i8", "<u2", "f2", "<f8", "c16"])
def test_numbers_and_arrays_of_numpy_become_plain_values(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    values = {"array": array, "columns": np.asfortranarray(array), "empty": array[:0], "number": array[1, 2]}
    for protocol in (2, 4, 5):
        torch.save(values, tmp_path / "file.pt", pickle_protocol=protocol)
        found = load_archive(tmp_path / "file.pt")
        assert all(np.array_equal(found[name], values[name]) and found[name].dtype == dtype
                   for name in ("array", "columns", "empty"))
        assert found["number"] == array[1, 2].item() and type(found["number"]) is type(array[1, 2].item())


def test_objects_of_numpy_that_are_not_plain_stay_placeholders(tmp_path):
    torch.save({"texts": np.array(["a"]), "objects": np.array([print]), "time": np.datetime64("2026-01-01")},
               tmp_path / "file.pt")
    assert all(isinstance(value, Placeholder) for value in load_archive(tmp_path / "file.pt").values())
