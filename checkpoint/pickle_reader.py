"""Reads pickles without executing anything in them.  No torch here.

A pickle is a program for a small stack machine.  This one builds numbers, texts and containers.  Where a program names
a class or function, calls it, or sets an object's state, it keeps a record of that, a Placeholder: nothing is imported
or called.  archive.py makes tensors and numpy's values of the placeholders that it knows.

A program of a few bytes can ask for much memory.  So no length is taken that the file does not have, and the number of
operations is limited, so that the values take 1 GB at most beside the bytes of the file.
"""

import pickle
import struct

MOST_VALUES = 20_000_000
CONTAINER = 10  # values that a container or an object counts as: it takes some 200 bytes
LARGEST_NUMBER = 255  # bytes of an integer
LARGEST_KEY = 2**60  # beyond it, integers with equal hashes would make dictionaries slow
SHOWN = 150  # characters of a name in a message


class RefusedContents(Exception):
    """A file is whole, but holds what cannot be read, or would take too much memory.  The text is the reason."""


class Placeholder:
    """What a pickle says of a class, a function or an object, none of which exists here.

    name      module and name, such as argparse.Namespace
    called    whether it stands for an object (the class was called) or for the class itself
    arguments      what the class or function was called with
    state     what the object's attributes were set from: usually a dictionary
    entries   (key, value) pairs that were added to it, as to a dictionary
    elements  values that were added to it, as to a list
    """

    __slots__ = ("name", "called", "arguments", "state", "entries", "elements")

    def __init__(self, name: str, called: bool = False, arguments=()):
        self.name, self.called, self.arguments = name, called, arguments
        self.state, self.entries, self.elements = None, [], []

    def __repr__(self):
        return printable(self.name)

    def attribute(self, name: str):
        """An attribute as the pickle sets it, or None."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def printable(words: str) -> str:
    """A class's name or an error's text in a message: those of hostile files may be long, or control a terminal."""
    shown = "".join(character if character.isprintable() else "?" for character in words[:SHOWN])
    return shown + ("…" if len(words) > SHOWN else "")


def text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


def long_integer(data: bytes):
    if len(data) > LARGEST_NUMBER:
        return Placeholder(f"integer of {len(data)} bytes", called=True)
    return int.from_bytes(data, "little", signed=True)


def old_text(data: bytes):
    """A str of Python 2, which may be bytes."""
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        return data


CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
NUMBERS = {pickle.BININT: struct.Struct("<i"), pickle.BININT1: struct.Struct("<B"), pickle.BININT2: struct.Struct("<H"),
           pickle.BINFLOAT: struct.Struct(">d")}
ONE, FOUR, EIGHT = struct.Struct("<B"), struct.Struct("<I"), struct.Struct("<Q")
BY_LENGTH = {  # the width of the length, and what the bytes behind it become
    pickle.SHORT_BINUNICODE: (ONE, text), pickle.BINUNICODE: (FOUR, text), pickle.BINUNICODE8: (EIGHT, text),
    pickle.SHORT_BINBYTES: (ONE, bytes), pickle.BINBYTES: (FOUR, bytes), pickle.BINBYTES8: (EIGHT, bytes),
    pickle.BYTEARRAY8: (EIGHT, bytes), pickle.SHORT_BINSTRING: (ONE, old_text), pickle.BINSTRING: (FOUR, old_text),
    pickle.LONG1: (ONE, long_integer), pickle.LONG4: (FOUR, long_integer),
}
MEMO_READS = {pickle.BINGET: ONE, pickle.LONG_BINGET: FOUR}
MEMO_WRITES = {pickle.BINPUT: ONE, pickle.LONG_BINPUT: FOUR}
IGNORED = {pickle.PROTO: ONE, pickle.FRAME: EIGHT}
EXTENSIONS = {pickle.EXT1: ONE, pickle.EXT2: struct.Struct("<H"), pickle.EXT4: FOUR}
SHORT_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


class PickleReader:
    """Reads pickles one behind the other from a binary file that has `size` more bytes.

    load() raises RefusedContents at a limit, EOFError where the file ends early, and anything at all where a pickle is
    damaged.  Protocols 2 to 5; the text forms of protocol 0, which torch.save does not write, are refused.
    """

    def __init__(self, file, size: int):
        self.file = file
        self.left = size
        self.values = 0
        self.stored: list[Placeholder] = []  # the objects that lie outside of the pickle, in archive.py the storages

    def load(self):
        self.stack, self.outer, self.memo = [], [], {}
        while (code := self.take(1)) != pickle.STOP:
            self.values += CONTAINER if code in OPERATIONS else 1
            if self.values > MOST_VALUES:
                raise RefusedContents(f"it holds more than {MOST_VALUES // CONTAINER // 1_000_000} million objects or "
                                      f"{MOST_VALUES // 1_000_000} million numbers beside its tensors")
            self.operate(code)
        return self.stack.pop()

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise EOFError(f"it ends {size - self.left} bytes early")
        self.left -= size
        data = self.file.read(size)
        if len(data) != size:
            raise EOFError("it ends early")
        return data

    def take_number(self, form: struct.Struct):
        return form.unpack(self.take(form.size))[0]

    def take_line(self) -> str:
        line = self.file.readline(min(self.left, 1 << 16))
        self.left -= len(line)
        if line[-1:] != b"\n":
            raise EOFError("it ends early")
        return text(line[:-1])

    def operate(self, code: bytes) -> None:
        if code in CONSTANTS:
            self.push(CONSTANTS[code])
        elif code in NUMBERS:
            self.push(self.take_number(NUMBERS[code]))
        elif code in BY_LENGTH:
            form, convert = BY_LENGTH[code]
            self.push(convert(self.take(self.take_number(form))))
        elif code in MEMO_READS:
            self.push(self.memo[self.take_number(MEMO_READS[code])])
        elif code in MEMO_WRITES:
            self.memo[self.take_number(MEMO_WRITES[code])] = self.stack[-1]
        elif code in SHORT_TUPLES:
            self.stack[-SHORT_TUPLES[code]:] = [self.last(SHORT_TUPLES[code])]
        elif code in IGNORED:
            self.take_number(IGNORED[code])
        elif code in EXTENSIONS:
            self.push(Placeholder(f"extension {self.take_number(EXTENSIONS[code])} of copyreg"))
        elif code in OPERATIONS:
            OPERATIONS[code](self)
        else:
            raise RefusedContents(f"its pickle uses the operation {code!r}, which torch.save does not write")

    def push(self, value) -> None:
        self.stack.append(value)

    def last(self, count: int) -> tuple:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        return tuple(self.stack[-count:])

    def to_mark(self) -> list:
        """The values since the last mark, taken off the stack."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    # --- containers ---

    def begin(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def append(self) -> None:
        self.extend_with([self.stack.pop()])

    def extend(self) -> None:
        self.extend_with(self.to_mark())

    def extend_with(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, list | Placeholder):
            raise TypeError(f"elements for a {type(target).__name__}")
        (target if isinstance(target, list) else target.elements).extend(items)

    def set_item(self) -> None:
        *_, key, value = self.last(2)
        del self.stack[-2:]
        self.set_with([key, value])

    def set_items(self) -> None:
        self.set_with(self.to_mark())

    def set_with(self, items: list) -> None:
        target, pairs = self.stack[-1], list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, Placeholder):
            target.entries.extend(pairs)
        elif isinstance(target, dict):
            target.update((usable_key(key), value) for key, value in pairs)
        else:
            raise TypeError(f"entries for a {type(target).__name__}")

    def add_items(self) -> None:
        items = self.to_mark()
        if not isinstance(self.stack[-1], set):
            raise TypeError("no set to add to")
        self.stack[-1].update(map(usable_key, items))

    def make_dict(self) -> None:
        items = self.to_mark()
        self.push({usable_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    # --- classes and objects, of which only the names are kept ---

    def name(self) -> None:
        module, name = self.take_line(), self.take_line()
        self.push(Placeholder(f"{module}.{name}"))

    def name_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(Placeholder(f"{module}.{name}" if isinstance(name, str) and isinstance(module, str) else "?"))

    def call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.push(called_with(called, arguments))

    def call_with_keywords(self) -> None:
        _, arguments, called = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.push(called_with(called, arguments))

    def call_from_mark(self) -> None:
        called, *arguments = self.to_mark()
        self.push(called_with(called, tuple(arguments)))

    def set_state(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state

    def stored_outside(self) -> None:
        self.stored.append(Placeholder("object outside of the pickle", called=True, arguments=self.stack.pop()))
        self.push(self.stored[-1])


def called_with(called, arguments) -> Placeholder:
    """The object that a call would have made."""
    return Placeholder(called.name if isinstance(called, Placeholder) else type(called).__name__, True, arguments)


def usable_key(key, depth: int = 0):
    """A key that can be hashed quickly: hashing nested tuples would exhaust the C stack."""
    if isinstance(key, tuple) and depth < 3:
        for part in key:
            usable_key(part, depth + 1)
    elif isinstance(key, tuple | frozenset) or (isinstance(key, int) and abs(key) > LARGEST_KEY):
        raise RefusedContents("a dictionary in it has keys that are nested or very large")
    return key


OPERATIONS = {
    pickle.MARK: PickleReader.begin,
    pickle.POP: lambda reader: reader.stack.pop() if reader.stack else reader.to_mark(),
    pickle.POP_MARK: PickleReader.to_mark,
    pickle.DUP: lambda reader: reader.push(reader.stack[-1]),
    pickle.MEMOIZE: lambda reader: reader.memo.update({len(reader.memo): reader.stack[-1]}),
    pickle.EMPTY_LIST: lambda reader: reader.push([]),
    pickle.EMPTY_DICT: lambda reader: reader.push({}),
    pickle.EMPTY_SET: lambda reader: reader.push(set()),
    pickle.LIST: lambda reader: reader.push(reader.to_mark()),
    pickle.TUPLE: lambda reader: reader.push(tuple(reader.to_mark())),
    pickle.FROZENSET: lambda reader: reader.push(frozenset(map(usable_key, reader.to_mark()))),
    pickle.DICT: PickleReader.make_dict,
    pickle.APPEND: PickleReader.append,
    pickle.APPENDS: PickleReader.extend,
    pickle.SETITEM: PickleReader.set_item,
    pickle.SETITEMS: PickleReader.set_items,
    pickle.ADDITEMS: PickleReader.add_items,
    pickle.GLOBAL: PickleReader.name,
    pickle.STACK_GLOBAL: PickleReader.name_from_stack,
    pickle.REDUCE: PickleReader.call,
    pickle.NEWOBJ: PickleReader.call,
    pickle.NEWOBJ_EX: PickleReader.call_with_keywords,
    pickle.OBJ: PickleReader.call_from_mark,
    pickle.BUILD: PickleReader.set_state,
    pickle.BINPERSID: PickleReader.stored_outside,
    pickle.NEXT_BUFFER: lambda reader: reader.push(Placeholder("buffer outside of the pickle", True)),
    pickle.READONLY_BUFFER: lambda reader: None,
}
