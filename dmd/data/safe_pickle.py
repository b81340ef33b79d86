"""Read a pickle without running anything that it holds.

A pickle is a program: the reader that comes with Python imports and calls whatever the file
names. The reader here is a machine of its own for the part of that language which datasets
need. It imports nothing, looks up no attribute that a file names, and knows ten callables
(`pickle_values`). It reads protocols 0 to 5, written by Python 2 or 3 and by NumPy 1 or 2, and
admits arrays and scalars of numbers, booleans and text, object arrays, list, tuple, dict, set,
frozenset, str, bytes, bytearray, int, float, complex, bool and None.
"""

import codecs
import mmap
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from dmd.data import pickle_values as values
from dmd.data.pickle_values import Refusal, require

# Bytes a byte of the file: of the result, shared parts counted each time, and of what calls make.
MAX_EXPANSION = 100
MAX_INTEGER = 255  # bytes or digits of an integer
OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"PK\x03\x04": "a zip archive (or a PyTorch file), not a pickle",
    b"\x93NUMPY": "a .npy file, not a pickle",
    b"\x89HDF": "an HDF5 file, not a pickle",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file that it stands for",
    b"<": "a web page or XML, not a pickle: the download went wrong",
}


def load(path: str | os.PathLike[str]) -> Any:
    """What the pickle at `path` holds; text that Python 2 wrote as bytes is read as Latin-1.

    Needs memory for about twice the file. Raises OSError where the file can't be read, and
    ValueError where it is no pickle, is broken, or holds or asks for anything but what is
    admitted; both with one sentence that names the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise OSError(f"cannot read {path}: it is not a file")
        if size == 0:
            raise ValueError(f"{path} is empty: it holds no pickle")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data, str(path))
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"cannot read {path}: {os.strerror(error.errno)}") from None


def loads(data: bytes, name: str = "the pickle") -> Any:
    """As `load`, from bytes in memory; `name` is what messages call them."""
    if not data:
        raise ValueError(f"{name} is empty: it holds no pickle")
    return _read(data, name)


def _read(data: bytes | mmap.mmap, name: str) -> Any:
    for start, what in OTHER_FORMATS.items():
        if data[: len(start)] == start:
            raise ValueError(f"{name} is {what}")
    machine = _Machine(data)
    try:
        result = machine.run()
        values.check_result(result, limit=MAX_EXPANSION * len(data) + 1_000_000)
    except Refusal as refusal:
        raise ValueError(f"cannot read {name} as plain data: {refusal}") from None
    except MemoryError:
        raise ValueError(f"cannot read {name}: it does not fit into memory") from None
    except (LookupError, TypeError, ValueError, OverflowError, struct.error):
        # Without the error's own text, which may quote what the file holds.
        raise ValueError(
            f"cannot read {name}: it is no pickle, or broken at byte {machine.start}"
        ) from None
    return result


class _Machine:
    """The stack, the marks on it and the memo; a method or a small function an opcode."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self.at = 0  # the next byte
        self.start = 0  # where the current opcode began, for messages
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.room = MAX_EXPANSION * len(data)  # bytes that calls may still make

    def run(self) -> Any:
        """Carry out the opcodes up to STOP, which has to be the last byte."""
        while True:
            self.start = self.at
            code = self.take(1)[0]
            if code == pickle.STOP[0]:
                break
            if code not in OPCODES:
                raise Refusal(f"byte {self.start} is no part of a pickle of plain data")
            OPCODES[code](self)
        if self.at < len(self.data):
            raise Refusal(f"{len(self.data) - self.at} bytes follow its end")
        (result,) = self.stack
        require(not self.below, "an open mark")
        return result

    # Reading

    def need(self, size: int) -> None:
        """Refuse unless `size` more bytes are there: no size is believed before that."""
        left = len(self.data) - self.at
        if size > left:
            raise Refusal(
                f"it is cut off or broken: byte {self.start} needs {size} bytes more, "
                f"but {left} are left"
            )

    def take(self, size: int) -> bytes:
        self.need(size)
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise Refusal("it is cut off or broken: a line of text does not end")
        return self.take(end + 1 - self.at)[:-1]

    def integer_line(self) -> int:
        digits = self.line()
        require(len(digits) <= MAX_INTEGER, "an integer that is too long")
        return int(digits.removesuffix(b"L"))

    # The stack

    def push(self, x: Any) -> None:
        self.stack.append(x)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, kind: type) -> Any:
        x = self.stack[-1]
        require(type(x) is kind, f"a {type(x).__name__} where a {kind.__name__} has to be")
        return x

    # Opcodes that take more than a line

    def protocol(self) -> None:
        version = self.number(1)
        require(version <= 5, f"protocol {version}, but the newest is 5")

    def drop(self) -> None:
        if self.stack:
            self.pop()
        else:
            self.pop_mark()

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.push(self.memo[index])

    def boolean_or_integer(self) -> None:
        at = self.at
        word = self.line()
        if word in (b"00", b"01"):
            self.push(word == b"01")
        else:
            self.at = at
            self.push(self.integer_line())

    def integer(self, size: int) -> None:
        require(size <= MAX_INTEGER, f"an integer of {size} bytes")
        self.push(self.number(size, signed=True))

    def quoted(self) -> None:
        """A byte string of Python 2, as its source code would spell it."""
        word = self.line().strip()
        require(len(word) > 1 and word[0] == word[-1] and word[0] in b"'\"", "a broken string")
        self.push(codecs.escape_decode(word[1:-1])[0].decode("latin1"))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add(self, items: list[Any]) -> None:
        self.top(set).update(values.set_of(items))

    def fill(self, items: list[Any]) -> None:
        target = self.top(dict)
        for k, v in zip(items[::2], items[1::2], strict=True):
            target[values.key(k)] = v

    def new_dict(self) -> None:
        items = self.pop_mark()
        self.push({})
        self.fill(items)

    def named(self, module: Any, name: Any) -> None:
        """GLOBAL. Nothing is imported: a name is in the table, or the stream is refused."""
        require(type(module) is type(name) is str, "a name that is no text")
        if (module, name) not in values.CALLABLES:
            asked = f"{module}.{name}".encode("unicode_escape").decode()
            asked = asked if len(asked) <= 80 else asked[:80] + "..."
            raise Refusal(f"it asks for {asked}, but only {values.ADMITTED} are admitted")
        self.push(values.CALLABLES[module, name])

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        require(type(function) is FunctionType, "a call of something that is no function")
        require(type(arguments) is tuple, "a call with broken arguments")
        self.push(function(*arguments))
        self.count()

    def count(self) -> None:
        """Count what a call has made: a few bytes can copy one long text again and again."""
        x = self.stack[-1]
        self.room -= x.nbytes if type(x) is np.ndarray else sys.getsizeof(x)
        require(self.room >= 0, values.TOO_LARGE)

    def build(self) -> None:
        state, x = self.pop(), self.stack[-1]
        if type(x) is np.ndarray:
            values.set_array(x, state)
            self.count()
        elif isinstance(x, np.dtype):
            values.set_byte_order(x, state)
        else:
            raise Refusal(f"it sets the state of a {type(x).__name__}")


_M = _Machine
# Absent, so refused: persistent ids, extension codes, INST, OBJ, NEWOBJ, buffers out of band.
OPCODES: dict[int, Callable[[_Machine], Any]] = {
    code[0]: action
    for code, action in (
        (pickle.PROTO, _M.protocol),
        (pickle.FRAME, lambda m: m.need(m.number(8))),
        (pickle.MARK, _M.mark),
        (pickle.POP, _M.drop),
        (pickle.POP_MARK, _M.pop_mark),
        (pickle.DUP, lambda m: m.push(m.stack[-1])),
        (pickle.PUT, lambda m: m.remember(m.integer_line())),
        (pickle.BINPUT, lambda m: m.remember(m.number(1))),
        (pickle.LONG_BINPUT, lambda m: m.remember(m.number(4))),
        (pickle.MEMOIZE, lambda m: m.remember(len(m.memo))),
        (pickle.GET, lambda m: m.recall(m.integer_line())),
        (pickle.BINGET, lambda m: m.recall(m.number(1))),
        (pickle.LONG_BINGET, lambda m: m.recall(m.number(4))),
        (pickle.NONE, lambda m: m.push(None)),
        (pickle.NEWTRUE, lambda m: m.push(True)),
        (pickle.NEWFALSE, lambda m: m.push(False)),
        (pickle.INT, _M.boolean_or_integer),
        (pickle.LONG, lambda m: m.push(m.integer_line())),
        (pickle.BININT, lambda m: m.integer(4)),
        (pickle.BININT1, lambda m: m.push(m.number(1))),
        (pickle.BININT2, lambda m: m.push(m.number(2))),
        (pickle.LONG1, lambda m: m.integer(m.number(1))),
        (pickle.LONG4, lambda m: m.integer(m.number(4))),
        (pickle.FLOAT, lambda m: m.push(float(m.line()))),
        (pickle.BINFLOAT, lambda m: m.push(struct.unpack(">d", m.take(8))[0])),
        (pickle.STRING, _M.quoted),
        (pickle.BINSTRING, lambda m: m.push(m.take(m.number(4)).decode("latin1"))),
        (pickle.SHORT_BINSTRING, lambda m: m.push(m.take(m.number(1)).decode("latin1"))),
        (pickle.UNICODE, lambda m: m.push(m.line().decode("raw-unicode-escape"))),
        (pickle.SHORT_BINUNICODE, lambda m: m.text(m.number(1))),
        (pickle.BINUNICODE, lambda m: m.text(m.number(4))),
        (pickle.BINUNICODE8, lambda m: m.text(m.number(8))),
        (pickle.SHORT_BINBYTES, lambda m: m.push(m.take(m.number(1)))),
        (pickle.BINBYTES, lambda m: m.push(m.take(m.number(4)))),
        (pickle.BINBYTES8, lambda m: m.push(m.take(m.number(8)))),
        (pickle.BYTEARRAY8, lambda m: m.push(bytearray(m.take(m.number(8))))),
        (pickle.EMPTY_TUPLE, lambda m: m.push(())),
        (pickle.TUPLE, lambda m: m.push(tuple(m.pop_mark()))),
        (pickle.TUPLE1, lambda m: m.push((m.pop(),))),
        (pickle.TUPLE2, lambda m: m.push((m.pop(), m.pop())[::-1])),
        (pickle.TUPLE3, lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1])),
        (pickle.EMPTY_LIST, lambda m: m.push([])),
        (pickle.LIST, lambda m: m.push(m.pop_mark())),
        (pickle.APPEND, lambda m: m.extend([m.pop()])),
        (pickle.APPENDS, lambda m: m.extend(m.pop_mark())),
        (pickle.EMPTY_DICT, lambda m: m.push({})),
        (pickle.DICT, _M.new_dict),
        (pickle.SETITEM, lambda m: m.fill([m.pop(), m.pop()][::-1])),
        (pickle.SETITEMS, lambda m: m.fill(m.pop_mark())),
        (pickle.EMPTY_SET, lambda m: m.push(set())),
        (pickle.ADDITEMS, lambda m: m.add(m.pop_mark())),
        (pickle.FROZENSET, lambda m: m.push(frozenset(values.set_of(m.pop_mark())))),
        (pickle.GLOBAL, lambda m: m.named(m.line().decode(), m.line().decode())),
        (pickle.STACK_GLOBAL, lambda m: m.named(*[m.pop(), m.pop()][::-1])),
        (pickle.REDUCE, _M.reduce),
        (pickle.BUILD, _M.build),
    )
}
