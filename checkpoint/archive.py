"""Reads the files of torch.save without executing anything in them.

A file is a pickle and the bytes of the tensors.  Newer ones are a zip archive, NAME/data.pkl beside NAME/data/0, …;
older ones are five pickles and the tensors one behind the other.  pickle_reader.py reads the pickle.  Here its
placeholders of tensors and of numpy's numbers and arrays become values; objects of other classes stay placeholders.
"""

import io
import re
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from checkpoint.pickle_reader import MOST_VALUES, PickleReader, Placeholder, RefusedContents, usable_key

DEEPEST = 100  # containers within one another; what is deeper stays unread
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip archive: signature, lengths of its name and extra field
LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
LEGACY_PROTOCOL = 1001
BLOCK = 1 << 26
STORAGE_TYPES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
                 "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
                 "Untyped": torch.uint8, "Bool": torch.bool, "ComplexFloat": torch.complex64,
                 "ComplexDouble": torch.complex128}
DTYPES = {str(dtype): dtype for dtype in {*STORAGE_TYPES.values(), *(
    getattr(torch, name) for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name))}}
NUMPY_TYPE = re.compile("b1|[iu][1248]|f[248]|c8|c16")


def load_archive(path, verified: bool = False):
    """The value that torch.save wrote, its tensors on the host.  `verified`: its bytes have been checked already.

    RefusedContents where the file is of another kind or takes too much memory.  Anything else that is raised, but
    OSError and MemoryError, means damage.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = path.stat().st_size
        if file.peek(2)[:2] != b"PK":
            return legacy_contents(file, size)
        return zip_contents(file, Records(file, size, not verified))


@dataclass
class Records:
    """Where the bytes of each storage lie in a file of `size` bytes: key → (offset, length, CRC)."""

    file: object
    size: int
    have_checksums: bool
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    taken: int = 0

    def read(self, key: str) -> torch.Tensor:
        """The bytes of a storage, (length,) uint8."""
        offset, length, checksum = self.places[key]
        self.taken += length  # places may overlap
        if offset < 0 or offset + length > self.size or self.taken > self.size:
            raise EOFError(f"the tensors take more than its {self.size} bytes")
        storage = np.empty(length, np.uint8)  # torch.empty raises no MemoryError
        view, found = memoryview(storage), 0
        self.file.seek(offset)
        for start in range(0, length, BLOCK):
            block = view[start:start + BLOCK]
            if self.file.readinto(block) != len(block):
                raise EOFError("it ends early")
            found = zlib.crc32(block, found) if self.have_checksums else checksum
        if found != checksum and length:
            raise ValueError(f"the checksum of {key} does not match")
        return torch.from_numpy(storage)


def zip_contents(file, records: Records):
    """The value in a zip archive."""
    if not zipfile.is_zipfile(file):
        raise EOFError("it ends early, or its directory is overwritten")
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    data = next((name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if data is None:
        raise RefusedContents("it is a zip archive, but not one of torch.save")
    folder = data.removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise RefusedContents("it is a TorchScript program, not weights")
    for name, entry in entries.items():
        if name.startswith(folder):
            records.places[name.removeprefix(folder)] = place_of(file, entry)
    if "byteorder" in records.places and bytes(records.read("byteorder").numpy()) != sys.byteorder.encode():
        raise RefusedContents("its numbers have another byte order than this machine's")
    program = bytes(records.read("data.pkl").numpy())
    records.places = {name.removeprefix("data/"): place for name, place in records.places.items()
                      if name.startswith("data/")}
    return Values(records).of(PickleReader(io.BytesIO(program), len(program)).load())


def place_of(file, entry: zipfile.ZipInfo) -> tuple[int, int, int]:
    """Where the bytes of an entry of a zip archive lie."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise RefusedContents("its contents are compressed, as torch.save never does; unpack the archive, and pack it "
                              "with zip -0")
    if entry.compress_size != entry.file_size:
        raise ValueError(f"two lengths of {entry.filename}")
    file.seek(entry.header_offset)
    signature, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise ValueError(f"no header of {entry.filename}")
    return entry.header_offset + LOCAL_HEADER.size + name + extra, entry.file_size, entry.CRC


def legacy_contents(file, size: int):
    """The value in a file of torch.save before 1.6, or with _use_new_zipfile_serialization=False."""
    reader = PickleReader(file, size)
    if file.peek(1)[:1] != b"\x80":
        raise ValueError("no file of torch.save")
    first = reader.load()
    if first != LEGACY_MAGIC:
        raise RefusedContents("it is a pickle, but not one of torch.save")
    if reader.load() != LEGACY_PROTOCOL:
        raise RefusedContents("it is of an unknown version of torch.save")
    reader.load()  # sizes of C types on the machine that wrote it
    program, stored = reader.load(), reader.stored
    item_sizes = {pid[2]: STORAGE_TYPES[storage_name(pid[1])].itemsize for pid in (item.arguments for item in stored)
                  if is_storage(pid)}
    records = Records(file, size, have_checksums=False)
    for key in reader.load():
        if key not in item_sizes:
            raise RefusedContents("it holds numbers of an unknown type")
        length = reader.take_number(struct.Struct("<q")) * item_sizes[key]
        if not 0 <= length <= reader.left:
            raise EOFError("it ends early")
        records.places[key] = (file.tell(), length, 0)
        file.seek(length, io.SEEK_CUR)
        reader.left -= length
    return Values(records).of(program)


def is_storage(pid) -> bool:
    """Whether a persistent id is ("storage", class, key, device, length, …) of a type that is known."""
    return (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[2], str)
            and storage_name(pid[1]) in STORAGE_TYPES)


def storage_name(storage_class) -> str:
    """torch.cuda.FloatStorage → Float"""
    name = storage_class.name if isinstance(storage_class, Placeholder) else ""
    return name.rpartition(".")[2].removesuffix("Storage") if name.startswith("torch.") else ""


class Values:
    """Makes values of what a PickleReader returned."""

    def __init__(self, records: Records):
        self.records = records
        self.storages: dict[str, torch.Tensor] = {}
        self.done: dict[int, object] = {}  # by the id of what the reader returned
        self.sizes: dict[int, int] = {}  # how many values a container holds, each as often as it occurs

    def of(self, item, depth: int = 0):
        """The value of one item, the same object wherever the same item occurs."""
        if not isinstance(item, dict | list | tuple | Placeholder):
            return item
        if id(item) not in self.done:
            kind = type(item).__name__
            if depth > DEEPEST:
                return Placeholder(f"{kind} in more than {DEEPEST} others", called=True)
            self.done[id(item)] = Placeholder(f"{kind} that contains itself", called=True)
            self.done[id(item)] = self.made(item, depth)
        return self.done[id(item)]

    def made(self, item, depth: int):
        """A container, a tensor, a number or an array; an object of any other class is returned as it is, unread."""
        if not isinstance(item, Placeholder):
            return self.container(item, item, depth)
        if item.called and item.name in MAKERS:
            given = item.arguments if isinstance(item.arguments, tuple) else ()
            made = MAKERS[item.name](self, item, [self.of(part, depth + 1) for part in given], depth + 1)
            return item if made is None else made
        if item.entries:  # of a class that extends dict
            return self.dictionary(item, [], depth)
        return item

    def container(self, item, contents, depth: int):
        """The values of a dictionary, list or tuple, which are the contents of `item`."""
        parts = list(contents.values()) if isinstance(contents, dict) else contents
        values = [self.of(part, depth + 1) for part in parts]
        # Containers that occur in one another many times take little memory, but forever to print or to compare.
        self.sizes[id(item)] = 1 + sum(self.sizes.get(id(part), 1) for part in parts)
        if self.sizes[id(item)] > MOST_VALUES:
            raise RefusedContents("its containers hold one another too many times")
        return dict(zip(contents, values, strict=True)) if isinstance(contents, dict) else type(contents)(values)

    def dictionary(self, item: Placeholder, arguments: list, depth: int):
        """Of OrderedDict([pairs]), Counter(dict) or defaultdict(factory), and of what was added to it"""
        first = arguments[0] if arguments else ()
        pairs = first.items() if isinstance(first, dict) else first if isinstance(first, list) else ()
        return self.container(item, {usable_key(key): value for key, value in (*pairs, *item.entries)}, depth)

    def tensor(self, item: Placeholder, arguments: list, depth: int):
        """_rebuild_tensor(storage, offset, size, stride, …), _rebuild_tensor_v3(…, gradient, hooks, dtype, …)"""
        storage, offset, size, stride, *more = arguments
        pid = storage.arguments if isinstance(storage, Placeholder) else None
        if not is_storage(pid) or (len(pid) > 5 and pid[5] is not None):
            return None
        dtype = STORAGE_TYPES[storage_name(pid[1])]
        if item.name.endswith("_v3"):
            dtype = DTYPES.get(getattr(more[2], "name", None))
        if dtype is None:
            return None
        key = pid[2]
        if key not in self.storages:
            self.storages[key] = self.records.read(key)
        view = self.storages[key].view(dtype).as_strided(size, stride, offset)
        # One number can be a tensor of any size, until it is copied.
        return view if view.numel() * view.itemsize <= self.records.size else None

    def parameter(self, item: Placeholder, arguments: list, depth: int):
        """The tensor that a Parameter was made of"""
        return arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None

    def tensor_with_attributes(self, item: Placeholder, arguments: list, depth: int):
        """_rebuild_from_type_v2(function, type, arguments, state), without the attributes"""
        function, _, inner, _ = item.arguments
        call = Placeholder(function.name, called=True, arguments=inner)
        return self.made(call, depth) if function.name.startswith("torch._utils._rebuild_") else None

    def number(self, item: Placeholder, arguments: list, depth: int):
        """numpy's scalar(dtype, bytes)"""
        dtype, data = arguments
        return np.frombuffer(data, numpy_type(dtype), 1).item() if numpy_type(dtype) else None

    def array(self, item: Placeholder, arguments: list, depth: int):
        """An array from its state (version, shape, dtype, whether in Fortran's order, bytes)"""
        _, shape, dtype, in_columns, data = item.state
        return shaped(dtype, self.of(data, depth), shape, "F" if in_columns else "C")

    def array_of_buffer(self, item: Placeholder, arguments: list, depth: int):
        """numpy's _frombuffer(bytes, dtype, shape, order)"""
        data, dtype, shape, order = arguments
        return shaped(dtype, data, shape, order)

    def collection(self, item: Placeholder, arguments: list, depth: int):
        """Of set, frozenset or torch.Size, made of a list or tuple"""
        kind = tuple if item.name == "torch.Size" else set
        return kind(map(usable_key, arguments[0])) if arguments else kind()

    def encoded(self, item: Placeholder, arguments: list, depth: int):
        """_codecs.encode(text, "latin1"), bytes() and bytearray(text, "latin-1"): how protocol 2 writes bytes"""
        data = arguments[0] if arguments else b""
        return data.encode("latin1") if isinstance(data, str) else bytes(data) if isinstance(data, bytes) else None


def shaped(dtype, data, shape, order: str) -> np.ndarray | None:
    kind = numpy_type(dtype)
    if kind is None or not isinstance(data, bytes):
        return None
    return (np.frombuffer(data, kind) if data else np.empty(0, kind)).reshape(shape, order=order)


def numpy_type(dtype) -> np.dtype | None:
    """The type that a pickle of numpy.dtype describes: its state is (version, byte order, …)."""
    if not isinstance(dtype, Placeholder) or dtype.name != "numpy.dtype" or not isinstance(dtype.arguments, tuple):
        return None
    code, order = str(dtype.arguments[0]), str(dtype.state[1]) if isinstance(dtype.state, tuple) else "="
    return np.dtype(order + code) if NUMPY_TYPE.fullmatch(code) and order in ("<", ">", "=", "|") else None


MAKERS = {
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
                     "torch._utils._rebuild_tensor_v3"), Values.tensor),
    **dict.fromkeys(("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
                     "torch.nn.parameter.Parameter"), Values.parameter),
    "torch._tensor._rebuild_from_type_v2": Values.tensor_with_attributes,
    **{f"collections.{name}": Values.dictionary for name in ("OrderedDict", "defaultdict", "Counter")},
    **{f"{module}.{name}": maker for module in ("builtins", "__builtin__") for name, maker in (
        ("set", Values.collection), ("frozenset", Values.collection), ("bytes", Values.encoded),
        ("bytearray", Values.encoded))},
    "torch.Size": Values.collection,
    "_codecs.encode": Values.encoded,
    **{f"numpy.{core}.multiarray.scalar": Values.number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": Values.array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": Values.array_of_buffer for core in ("core", "_core")},
}
