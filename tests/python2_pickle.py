"""Write pickles as Python 2 and the NumPy of its time wrote them: text and raw data as bytes."""

import struct

import numpy as np


def dumps(x) -> bytes:
    """A pickle of protocol 2 of dicts, lists, tuples, str, bytes, numbers and arrays."""
    return b"\x80\x02" + _write(x) + b"."


def _write(x) -> bytes:
    if isinstance(x, str):
        return _write(x.encode())
    if isinstance(x, bytes):
        short = len(x) < 256
        return (b"U" + bytes([len(x)]) if short else b"T" + struct.pack("<i", len(x))) + x
    if isinstance(x, bool | type(None)):
        return {True: b"\x88", False: b"\x89", None: b"N"}[x]
    if isinstance(x, int):
        return b"J" + struct.pack("<i", x)
    if isinstance(x, float):
        return b"G" + struct.pack(">d", x)
    if isinstance(x, tuple):
        return b"(" + b"".join(map(_write, x)) + b"t"
    if isinstance(x, list):
        return b"](" + b"".join(map(_write, x)) + b"e"
    if isinstance(x, dict):
        return b"}(" + b"".join(_write(k) + _write(v) for k, v in x.items()) + b"u"
    if isinstance(x, np.ndarray):
        data = list(x.flat) if x.dtype.hasobject else x.tobytes()
        code = x.dtype.str[1:] + ("8" if x.dtype.hasobject else "")
        size = x.dtype.itemsize if x.dtype.kind in "SU" else -1
        order = {"=": "<"}.get(x.dtype.byteorder, x.dtype.byteorder)
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            + (_write((0,)) + _write("b") + b"\x87R(" + _write(1) + _write(x.shape))
            + (b"cnumpy\ndtype\n" + _write((code, 0, 1)) + b"R")
            + (_write((3, order, None, None, None, size, -1, 0)) + b"b")
            + (_write(False) + _write(data) + b"tb")
        )
    raise TypeError(type(x))
