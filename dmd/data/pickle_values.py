"""What `safe_pickle` may build: ten callables that a stream can name, and checks of the result.

Each callable is a stand-in that does for plain data what the original does, and nothing else.
Every size is checked before numpy hears of it.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

ADMITTED = "numpy arrays and scalars, builtin containers, text, bytes and numbers"
TOO_LARGE = "parts that, counted as often as they occur, would fill the memory"
MAX_KEY = 100  # parts of a tuple that is a key: each use of it takes a look at all of them
MAX_DEPTH = 100  # containers within containers; datasets have about four
LATIN1 = ("latin1", "latin-1")
SPECIFICATION = re.compile(r"[<>|=]?[biufcSUO][0-9]{0,6}")  # of an admitted dtype
SCALARS = (str, bytes, int, float, complex, bool, type(None))
ORDERS = ("C", "F", "K")


class Refusal(Exception):
    """Why a stream is not read, without the name of the file."""


def require(condition: bool, what: str) -> None:
    """Refuse a stream that holds `what` unless the condition is true."""
    if not condition:
        raise Refusal(f"it holds {what}")


def key(x: Any) -> Any:
    """`x`, if it may be a key of a dict or a member of a set.

    Nested tuples may not: where they share their parts, hashing one can take for ever.
    """
    parts = x if type(x) is tuple else (x,)
    require(len(parts) <= MAX_KEY, f"a key of {len(parts)} parts")
    plain = all(type(part) in SCALARS or isinstance(part, np.generic) for part in parts)
    require(plain, "a key that is neither text, bytes, a number nor a tuple of these")
    return x


def set_of(items: Any = ()) -> set[Any]:
    """A set, as protocols below 4 write it: of the items in a list."""
    require(type(items) in (list, tuple), "a set in an unknown form")
    return {key(x) for x in items}


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(set_of(items))


def _raw(data: Any) -> bytes:
    """The bytes of an array; Python 2 wrote them as a string, which is read as Latin-1."""
    return data.encode("latin1") if type(data) is str else bytes(data)


def _encode(text: Any, encoding: Any) -> bytes:
    require(type(text) is str and encoding in LATIN1, "bytes in an unknown form")
    return _raw(text)


def _bytes() -> bytes:
    return b""  # protocols below 3 have no other way to write it


def _bytearray(data: Any = b"", encoding: Any = "latin1") -> bytearray:
    require(type(data) in (bytes, str) and encoding in LATIN1, "a bytearray in an unknown form")
    return bytearray(_raw(data))


def _complex(real: Any, imaginary: Any) -> complex:
    require(type(real) is type(imaginary) is float, "a broken complex number")
    return complex(real, imaginary)


def _dtype(specification: Any, *flags: Any) -> "np.dtype[Any]":
    valid = type(specification) is str and SPECIFICATION.fullmatch(specification)
    require(bool(valid), "a dtype other than numbers, booleans, text or objects")
    # A copy, because the stream may set its byte order afterwards.
    return np.dtype("O" if "O" in specification else specification, copy=True)


def set_byte_order(dtype: "np.dtype[Any]", state: Any) -> None:
    """BUILD on a dtype. The byte order alone is the stream's: numpy would believe any flags."""
    require(type(state) is tuple and len(state) == 8, "a dtype with metadata or a broken state")
    _, order, subarray, names, fields, size, _, _ = state
    plain = subarray is names is fields is None and type(size) is int
    require(plain and size in (-1, dtype.itemsize), "a dtype with fields or a broken state")
    require(type(order) is str and order in ("<", ">", "|", "="), "an unknown byte order")
    size, alignment = (dtype.itemsize, dtype.alignment) if dtype.kind in "SU" else (-1, -1)
    dtype.__setstate__((3, order, None, None, None, size, alignment, dtype.flags))  # type: ignore[attr-defined]


def _ndarray(*_: Any) -> None:
    raise Refusal("it calls numpy.ndarray")  # admitted as the name of a class only


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    require(kind is _ndarray, "an array of an unknown class")
    return np.ndarray((0,), np.int8)  # the BUILD that follows gives it shape and content


def _check_shape(shape: Any, dtype: Any, size: int) -> None:
    """Refuse unless an array of this shape and type takes `size` bytes."""
    known = type(shape) is tuple and len(shape) <= 32 and isinstance(dtype, np.dtype)
    require(
        known and all(type(n) is int and n >= 0 for n in shape),
        "an array with a broken shape or dtype",
    )
    require(dtype.itemsize > 0 or shape == (), "an array of a type without size")
    needed = math.prod(shape) * dtype.itemsize
    require(needed == size, f"an array whose shape does not fit its {size} bytes of data")


def set_array(array: np.ndarray, state: Any) -> None:
    """BUILD on an array: version, shape, dtype, whether in Fortran order, content."""
    require(type(state) is tuple and len(state) == 5, "an array with a broken state")
    _, shape, dtype, fortran, data = state
    if isinstance(dtype, np.dtype) and dtype.hasobject:
        require(type(data) is list, "an object array without a list of objects")
        _check_shape(shape, dtype, dtype.itemsize * len(data))
    else:
        require(type(data) in (bytes, bytearray, str), "an array without data")
        data = _raw(data)
        _check_shape(shape, dtype, len(data))
    array.__setstate__((1, shape, dtype, bool(fortran), data))  # type: ignore[arg-type]


def _scalar(dtype: Any, data: Any = b"") -> Any:
    require(isinstance(dtype, np.dtype) and not dtype.hasobject, "a scalar of an unknown type")
    array = np.ndarray((0,), np.int8)
    set_array(array, (1, (), dtype, False, data))
    return array[()]


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """An array as protocol 5 writes it; order K: in C order, then with its axes moved."""
    require(type(data) in (bytes, bytearray), "an array without data")
    _check_shape(shape, dtype, len(data))
    require(not dtype.hasobject, "an object array without a list of objects")
    require(type(order) is str and order in ORDERS, "an array of an unknown order")
    array = np.ndarray(shape, dtype, data, order="F" if order == "F" else "C")
    if order != "K" or axes is None:
        return array
    require(type(axes) is tuple and all(type(a) is int for a in axes), "broken axes")
    return array.transpose(axes)


CALLABLES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):  # before NumPy 2 and since
    CALLABLES[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    CALLABLES[f"{_core}.multiarray", "scalar"] = _scalar
    CALLABLES[f"{_core}.numeric", "_frombuffer"] = _frombuffer
for _builtins in ("__builtin__", "builtins"):  # Python 2 and 3
    CALLABLES[_builtins, "bytes"] = _bytes
    CALLABLES[_builtins, "bytearray"] = _bytearray
    CALLABLES[_builtins, "set"] = set_of
    CALLABLES[_builtins, "frozenset"] = _frozenset
    CALLABLES[_builtins, "complex"] = _complex


def check_result(root: Any, limit: int) -> None:
    """Refuse what would hurt whoever walks through the result: cycles, depth, memory bombs.

    A few bytes can put one list ten times into the next, and that into the next: small in
    memory, endless to walk. `limit` bounds the bytes with shared parts counted each time.
    """
    sizes: dict[int, int] = {}  # of what has been walked through
    above: set[int] = set()  # the containers around the current one
    todo = [root]
    while todo:
        x = todo[-1]
        children = () if id(x) in sizes else _children(x)
        if id(x) in sizes:
            todo.pop()
        elif id(x) in above:  # for the second time: its children are done
            sizes[id(x)] = size = _bytes_of(x) + sum(
                _bytes_of(c) if type(c) in SCALARS else sizes[id(c)] for c in children
            )
            require(size <= limit, TOO_LARGE)
            above.remove(id(x))
            todo.pop()
        else:
            above.add(id(x))
            if len(above) > MAX_DEPTH:
                raise Refusal(f"its containers are nested more than {MAX_DEPTH} deep")
            inner = [c for c in children if type(c) not in SCALARS]
            if any(id(c) in above for c in inner):
                raise Refusal("one of its containers contains itself")
            todo.extend(inner)


def _children(x: Any) -> Iterable[Any]:
    if type(x) is dict:
        return [*x.keys(), *x.values()]
    if type(x) in (list, tuple, set, frozenset):
        return x
    if type(x) is np.ndarray:
        return list(x.flat) if x.dtype.hasobject else ()
    if type(x) in SCALARS or type(x) is bytearray or isinstance(x, np.generic):
        return ()
    raise Refusal(f"it holds a bare {type(x).__name__}, but only {ADMITTED} are admitted")


def _bytes_of(x: Any) -> int:
    if type(x) in (str, bytes, bytearray):
        return 1 + len(x)
    return 1 + x.nbytes if type(x) is np.ndarray else 1
