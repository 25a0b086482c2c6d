"""Checkpoints with hostile pickles for tools/fuzz.py, as strategies of Hypothesis that draw the bytes of one file.

A pickle is a program.  Drawn are pieces of programs that call functions, build objects, ask for memory, nest without
end or misuse memo and stack; they are put into the pickle of a sound checkpoint, as the value of a key, as a key, or in
place of everything.  Whatever is called would leave a file EXECUTED.
"""

import io
import pickle
import pickletools
import struct
import zipfile

import torch
from hypothesis import strategies as st

MARKER = "EXECUTED"
KEYS = ("data_loader", "model", "optimizer", "config", "phase", "step", "data", "rows", "skipped", "scaler", "files",
        "init_checkpoint", "master params", "epoch", "folder", "token_counts", "bert.pooler.dense.bias",
        "bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight")
OPEN = f"open({MARKER!r}, 'w')"
CALLS = (  # functions and arguments with which they would leave the marker
    ("os", "system", (f"touch {MARKER}",)), ("posix", "system", (f"touch {MARKER}",)), ("builtins", "eval", (OPEN,)),
    ("builtins", "exec", (OPEN,)), ("builtins", "open", (MARKER, "w")), ("os", "mkdir", (MARKER,)),
    ("subprocess", "check_output", (["touch", MARKER],)), ("io", "FileIO", (MARKER, "w")),
    ("torch", "save", (0, MARKER)),
    ("pickle", "loads", (b"cbuiltins\nopen\n(X\x08\x00\x00\x00EXECUTEDX\x01\x00\x00\x00wtR.",)),
)
KNOWN = ("collections OrderedDict", "collections defaultdict", "torch._utils _rebuild_tensor_v2", "torch Size",
         "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2", "numpy dtype", "torch FloatStorage",
         "numpy.core.multiarray scalar", "numpy.core.multiarray _reconstruct", "numpy.core.numeric _frombuffer",
         "_codecs encode", "builtins set", "torch.nn.parameter Parameter", "torch.storage _load_from_bytes",
         "builtins getattr", "builtins __import__", "torch.utils.data.dataloader DataLoader", "argparse Namespace",
         "copyreg _reconstructor", "functools partial", "\x1b[31m x", "a" * 5000 + " b")
WAYS = ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "BUILD", "SETITEM", "APPEND")
HUGE = (2**20, 2**28, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1)


def plain(value) -> bytes:
    """The program of a plain value, without header and end."""
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode("utf-8", "surrogatepass")


def called(function: bytes, arguments: bytes, way: str = "REDUCE") -> bytes:
    """A call in each way that pickles have; `arguments` is the program of a tuple."""
    return {"REDUCE": function + arguments + b"R", "NEWOBJ": function + arguments + b"\x81",
            "NEWOBJ_EX": function + arguments + b"}\x92", "OBJ": b"(" + function + arguments + b"o",
            "BUILD": function + b")R" + arguments + b"b", "SETITEM": function + b")R" + arguments + arguments + b"s",
            "APPEND": function + b")R" + arguments + b"a"}[way]


def by_stack(module: str, name: str) -> bytes:
    return plain(module) + plain(name) + b"\x93"


# --- pieces, each the program of one value ---

values = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70)
                      | st.floats(allow_subnormal=False) | st.text(max_size=9)
                      | st.binary(max_size=9), lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(
                          inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
counts = st.sampled_from((1, 2, 90, 101, 1000, 60_000))
ways = st.sampled_from(WAYS)


@st.composite
def executing(draw) -> bytes:
    """A function that would leave the marker, called, or only named, or set as an attribute that loading would call."""
    module, name, arguments = draw(st.sampled_from(CALLS))
    function = draw(st.sampled_from((named(module, name), by_stack(module, name))))
    call = called(function, plain(arguments), draw(ways))
    state = plain({}) + plain("__setstate__") + function + b"s"
    return draw(st.sampled_from((call, call, call, function, called(named("argparse", "Namespace"), state, "BUILD"),
                                 b"(i" + f"{module}\n{name}\n".encode(), called(call, b")"))))


@st.composite
def chains(draw) -> bytes:
    """Calls of what calls returned, with known and unknown names: getattr(__import__("os"), "system")(…)"""
    program = draw(executing())
    for name in draw(st.lists(st.sampled_from(KNOWN), min_size=1, max_size=4)):
        inner = b"(" + program + b"".join(map(plain, draw(st.lists(values, max_size=3)))) + b"t"
        program = called(named(*name.split(" ", 1)), inner, draw(ways))
    return program


@st.composite
def nested(draw) -> bytes:
    """Containers and calls in one another, or beside one another, many times."""
    count, inner = draw(counts), draw(st.one_of(values.map(plain), executing()))
    name = named(*draw(st.sampled_from(KNOWN)).split(" ", 1))
    few = min(count, 1000)
    return draw(st.sampled_from((
        b"]" * count + inner + b"a" * count, inner + b"\x85" * count, b"(" * count + inner + b"t" * count,
        (b"}" + plain("k")) * count + inner + b"s" * count, name * few + inner + b"\x85R" * few,
        b"}" + inner + b"\x85" * count + b"Ns", b"](" + b"}" * count + b"e", b"](" + b"\x8f" * count + b"e",
        inner + b"2" * count, b"(" * count + b"1" * count + inner, b"\x8f(" + inner + b"\x85" * count + b"\x90")))


@st.composite
def lengths(draw) -> bytes:
    """Lengths that the file does not have, and numbers of elements that no memory has."""
    huge = draw(st.sampled_from(HUGE))
    four, eight = struct.pack("<I", min(huge, 2**32 - 1)), struct.pack("<Q", huge)
    storage = plain(("storage",)) + b"0(" + plain("storage") + named("torch", "FloatStorage") + b"".join(
        map(plain, (draw(st.sampled_from(("0", "1", "../1", "no"))), "cpu", huge))) + b"tQ"
    sizes = draw(st.sampled_from(((huge,), (huge, 0), (2, -huge), (0,) * 80, (1, 1), (), (9, huge), (99, 24))))
    strides = draw(st.sampled_from(((0,), (1,), (0, 0), (huge, 1), ())))
    parts = map(plain, (draw(st.sampled_from((0, huge, -1))), sizes, strides, False, {}))
    tensor = called(named("torch._utils", "_rebuild_tensor_v2"), b"(" + storage + b"".join(parts) + b"t")
    dtype = called(named("numpy", "dtype"), plain(("f8", False, True))) + plain((3, "<", None)) + b"b"
    array = called(named("numpy.core.multiarray", "_reconstruct"), plain((None, (0,), b"b"))) + b"(" + plain(1) + plain(
        sizes) + dtype + plain(False) + plain(bytes(8)) + b"tb"
    return draw(st.sampled_from((b"X" + four + b"x", b"B" + four + b"x", b"\x8d" + eight + b"x", b"\x8e" + eight + b"x",
                                 b"\x96" + eight + b"x", b"\x8b" + four + b"x", b"T" + four, b"\x95" + eight + b"N",
                                 b"Nr" + four, b"j" + four, tensor, tensor, array, storage)))


@st.composite
def persistent(draw) -> bytes:
    """Objects outside of the pickle, by ids of any form."""
    kind = draw(st.sampled_from(("storage", "module", "file", "")))
    name = draw(st.one_of(executing(), st.sampled_from(KNOWN).map(lambda name: named(*name.split(" ", 1)))))
    tail = b"".join(map(plain, draw(st.lists(values, max_size=5))))
    return draw(st.sampled_from((b"(" + plain(kind) + name + tail + b"tQ", name + b"Q", tail + b"NQ", b"Pfile:x\n")))


@st.composite
def memory(draw) -> bytes:
    """Memo and stack misused: values that hold themselves, or one another exponentially often, or do not exist."""
    count = draw(st.sampled_from((3, 40, 90)))
    doubling = b"]" + b"".join(b"q" + bytes([n]) + b"(h" + bytes([n]) + b"h" + bytes([n]) + b"l" for n in range(count))
    ask = b"".join(draw(st.lists(st.sampled_from((b"h\x00", b"0", b"2", b"1", b"q\x00", b"\x94", b"(", b"e", b"u", b"s",
                                                  b"a", b"b", b"R", b"t", b"\x85", b"]", b"}", b"N", b".", b"\x90")),
                                 max_size=9)))
    return draw(st.sampled_from((b"]q\x05h\x05a", b"}q\x05X\x01\x00\x00\x00kh\x05s", b"]q\x05h\x05\x85a", doubling,
                                 b"](" + doubling + b"h\x00e", b"h\xff", ask, ask, b"}q\x05h\x05Ns",
                                 named("argparse", "Namespace") + b")Rq\x05h\x05b")))


@st.composite
def programs(draw, sound: bytes) -> bytes:
    """A sound pickle of a dictionary with a hostile piece in it, or a hostile piece alone."""
    piece = draw(st.one_of(executing(), executing(), chains(), nested(), lengths(), persistent(), memory()))
    key = plain(draw(st.sampled_from(KEYS)))
    body, end = sound[:-2], sound[-2:]
    assert end == b"u.", "the pickle of a dictionary ends in SETITEMS and STOP"
    holder = draw(st.sampled_from((piece, piece, b"]" + piece + b"a", b"}" + plain("state") + piece + b"s",
                                   b"(" + piece + b"t", b"}" + piece + b"Ns")))
    return draw(st.sampled_from((body + key + holder + end, body + key + holder + end, body + piece + b"N" + end,
                                 sound[:2] + holder + b".", sound[:2] + b"}" + key + holder + b"s.",
                                 body[:len(body) // 2] + piece + body[len(body) // 2:] + end)))


# --- files ---

def zip_files(sound: bytes) -> st.SearchStrategy[bytes]:
    """A file of torch.save with another pickle in it."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in entries if name.endswith("/data.pkl"))

    def packed(program: bytes) -> bytes:
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w") as archive:
            for name, data in {**entries, pickled: program}.items():
                archive.writestr(name, data)
        return memory.getvalue()

    return programs(entries[pickled]).map(packed)


def legacy_files(sound: bytes) -> st.SearchStrategy[bytes]:
    """The same for a file from before PyTorch 1.6: the fourth of its pickles."""
    file, ends = io.BytesIO(sound), []
    for _ in range(4):
        list(pickletools.genops(file))
        ends.append(file.tell())
    return programs(sound[ends[2]:ends[3]]).map(lambda program: sound[:ends[2]] + program + sound[ends[3]:])


def saved_before_1_6(value) -> bytes:
    memory = io.BytesIO()
    torch.save(value, memory, _use_new_zipfile_serialization=False)
    return memory.getvalue()
