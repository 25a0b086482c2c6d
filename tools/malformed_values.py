"""What tools/malformed.py builds on, as strategies of Hypothesis: changed bytes, changed values of JSON, op lists."""

import json

from hypothesis import strategies as st

OPS = b"linear\nmatmul\nbmm\ndropout\n"
OP_NAMES = ("linear", "matmul", "softmax", "layer_norm", "embedding", "dropout", "gelu", "tanh", "cross_entropy", "mul",
            "add", "iadd", "add_", "__add__", "truediv", "div", "nll_loss", "mean", "sum", "cat", "gather", "eq",
            "masked_fill", "rsub", "unsqueeze", "transpose", "float", "backward", "zero_", "sin", "fft_fft", "svd")
HOSTILE_NUMBERS = (0, 1, -1, 2, 3, 5, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, 10**400, 0.0, 0.5, -0.5, 1.5, 1e-9,
                   1e308, float("nan"), float("inf"), float("-inf"))


# --- bytes ---

def changed(sound: bytes) -> st.SearchStrategy[bytes]:
    """`sound` with one to four changes somewhere."""
    change = st.tuples(st.sampled_from(CHANGES), st.integers(0, len(sound)), st.binary(min_size=1, max_size=9))
    return st.lists(change, min_size=1, max_size=4).map(lambda changes: with_changes(sound, changes))


def with_changes(data: bytes, changes) -> bytes:
    for change, place, piece in changes:
        data = change(data, min(place, len(data)), piece)
    return data


def cut(data: bytes, place: int, piece: bytes) -> bytes:
    return data[:place]


def flip(data: bytes, place: int, piece: bytes) -> bytes:
    """Flip one bit of one byte."""
    flipped = bytes(byte ^ (1 << (piece[0] % 8)) for byte in data[place:place + 1])
    return data[:place] + flipped + data[place + 1:]


def write_over(data: bytes, place: int, piece: bytes) -> bytes:
    return data[:place] + piece + data[place + len(piece):]


def put_in(data: bytes, place: int, piece: bytes) -> bytes:
    return data[:place] + piece + data[place:]


def take_out(data: bytes, place: int, piece: bytes) -> bytes:
    return data[:place] + data[place + len(piece):]


def blank(data: bytes, place: int, piece: bytes) -> bytes:
    """A block of zeros, as a file system leaves after a crash."""
    size = 64 * piece[0]
    return data[:place] + bytes(min(size, len(data) - place)) + data[place + size:]


def repeat(data: bytes, place: int, piece: bytes) -> bytes:
    return data[:place] + data


CHANGES = (cut, flip, flip, write_over, put_in, take_out, blank, repeat)


# --- JSON and op lists ---

scalars = st.none() | st.booleans() | st.sampled_from(HOSTILE_NUMBERS) | st.integers(-9, 99) | st.text(max_size=9)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                                           max_size=3), max_leaves=6)


def json_texts(sound: bytes) -> st.SearchStrategy[bytes]:
    """The JSON object `sound` with bytes changed, with keys removed, renamed or replaced, or another text."""
    objects = edited(json.loads(sound), values).map(lambda value: json.dumps(value).encode())
    return st.one_of(changed(sound), objects, objects, values.map(lambda value: json.dumps(value).encode()),
                     st.sampled_from([b"", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff\xfe{}", b"NaN"]))


@st.composite
def edited(draw, sound, replacements):
    """Nested dicts and lists with one to three places removed, renamed, or replaced by what `replacements` gives."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw_path(draw, sound)
        if path:
            sound = edit(sound, path, draw(st.sampled_from(("remove", "rename", "replace"))), draw(replacements))
    return sound


def draw_path(draw, value) -> tuple:
    """The path to a value inside nested dicts and lists: half of all at the top, a quarter one level below, …"""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys:
        return ()
    key = draw(st.sampled_from(keys))
    return (key, *(draw_path(draw, value[key]) if draw(st.booleans()) else ()))


def edit(value, path: tuple, action: str, replacement):
    """A copy in which the place that `path` leads to is removed, renamed or replaced."""
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    key, *rest = path
    if rest:
        items[key] = edit(items[key], rest, action, replacement)
    else:
        old = items.pop(key)
        if action == "replace":
            items[key] = replacement
        elif action == "rename":
            items[f"{key}_"] = old
    return items if isinstance(value, dict) else list(items.values())


def op_lists() -> st.SearchStrategy[bytes]:
    """Lines of real and invented names, with and without the faults that a text file can have."""
    names = st.sampled_from(OP_NAMES)
    line = names | st.text(max_size=9) | st.sampled_from(["", " ", "#", "linear matmul", "\0", "é", "x" * 10_000])
    texts = st.lists(line, max_size=6).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
    return texts | changed(OPS) | st.binary(max_size=20)
