"""The reader of pickles runs nothing, gives one error, and reads what datasets hold."""

import copyreg
import gzip
import io
import itertools
import os
import pickle
import pickletools
import random
import struct
import subprocess
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import python2_pickle

from dmd.data import safe_pickle
from dmd.data.pickle_values import MAX_DEPTH

EXTENSION = 240  # a code that nobody else has registered


# Pieces of pickles


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


RECONSTRUCT = name("numpy.core.multiarray", "_reconstruct")
SCALAR = name("numpy.core.multiarray", "scalar")
FROMBUFFER = name("numpy._core.numeric", "_frombuffer")
FLOAT = name("numpy", "dtype") + b"(X\x02\x00\x00\x00f4\x89\x88tR"
STATE_SIZES = b"J\xff\xff\xff\xff" * 2  # of a dtype without text


def text(x):
    return b"X" + struct.pack("<I", len(x.encode())) + x.encode()


def raw(x):
    return b"B" + struct.pack("<I", len(x)) + x


def dotted(module, attribute):
    """A name as protocol 4 writes it, which may have dots: `os.system` of another module."""
    return b"\x80\x04" + text(module) + text(attribute) + b"\x93"


def tuple_of(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(function, *arguments):
    return function + tuple_of(*arguments) + b"R"


def dtype_of(code, state=b""):
    return call(name("numpy", "dtype"), text(code), b"\x89\x88") + state


def array_of(shape, dtype, data, fortran=b"\x89"):
    start = call(RECONSTRUCT, name("numpy", "ndarray"),
                 b"K\x00\x85", raw(b"b"))  # fmt: skip
    return start + tuple_of(b"K\x01", shape, dtype, fortran, data) + b"b"


def integer(x):
    return b"\x8a\x08" + struct.pack("<q", x)


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


# Pickles with which the stock reader writes the file `marker`


def live_pickles(marker):
    touch = text(f"touch '{marker}'")
    code = text(f"open({str(marker)!r}, 'w').close()")
    path = text(str(marker))
    system = name("os", "system")
    os_module = call(name("builtins", "__import__"), text("os"))
    evil = call(system, touch)
    memmap = tuple_of(path, text("uint8"), text("w+"), b"K\x00", b"K\x01\x85")
    namespace = name("types", "SimpleNamespace") + b")\x81"
    return {
        "os.system": evil,
        "posix.system": call(name("posix", "system"), touch),
        "subprocess.call": pickle.dumps(Call(subprocess.call, ["touch", marker]))[:-1],
        "eval": call(name("builtins", "eval"), code),
        "exec": call(name("builtins", "exec"), code),
        "eval of Python 2": call(name("__builtin__", "eval"), code),
        "open": call(name("io", "open"), path, text("w")),
        "getattr chain": call(call(name("builtins", "getattr"), os_module, text("system")), touch),
        "codecs.open": call(name("codecs", "open"), path, text("w")),
        "attrgetter": call(
            call(name("operator", "attrgetter"), text("system")) + tuple_of(os_module) + b"R", touch
        ),
        "methodcaller": call(
            call(name("operator", "methodcaller"), text("system"), touch), os_module
        ),
        "partial": call(call(name("functools", "partial"), system, touch)),
        "map in a list": call(
            name("builtins", "list"), call(name("builtins", "map"), system, b"]" + touch + b"a")
        ),
        "call in an object array": pickle.dumps(np.array([Call(os.system, f"touch '{marker}'")]))[
            :-1
        ],
        "call in the list of an object array": array_of(
            b"K\x01\x85", dtype_of("O8"), b"]" + evil + b"a"
        ),
        "call as a shape": array_of(evil + b"\x85", dtype_of("f4"), raw(b"")),
        "call as metadata of a dtype": dtype_of(
            "f8",
            tuple_of(
                b"K\x04", text("<"), b"NNN", STATE_SIZES, b"K\x00", b"}" + text("a") + evil + b"s"
            )
            + b"b",
        ),
        "call as a key": b"}" + evil + b"Ns",
        "call that is dropped": evil + b"0N",
        "call in a frozenset": b"\x80\x04(" + evil + b"\x91",
        "numpy.memmap": name("numpy", "memmap") + memmap + b"R",
        "numpy.testing": call(name("numpy.testing._private.utils", "runstring"), code, b"}"),
        "numpy.f2py": call(name("numpy.f2py.crackfortran", "myeval"), code, b"}}"),
        "numpy.savetxt": call(name("numpy", "savetxt"), path, b"]"),
        "dotted name": call(dotted("numpy.f2py.crackfortran", "os.system"), touch),
        "dotted name below numpy": call(dotted("numpy", "f2py.crackfortran.os.system"), touch),
        "name with protocol 4": call(dotted("os", "system"), touch),
        "INST": b"(" + touch + b"ios\nsystem\n",
        "OBJ": b"(" + name("subprocess", "check_call") + b"]" + text("touch") + b"a" + path + b"ao",
        "NEWOBJ": name("numpy", "memmap") + memmap + b"\x81",
        "NEWOBJ_EX": b"\x80\x04" + name("numpy", "memmap") + memmap + b"}\x92",
        "EXT1": bytes([0x82, EXTENSION]) + tuple_of(touch) + b"R",
        "EXT2": b"\x83" + struct.pack("<H", EXTENSION) + tuple_of(touch) + b"R",
        "EXT4": b"\x84" + struct.pack("<I", EXTENSION) + tuple_of(touch) + b"R",
        "copyreg._reconstructor": call(
            name("copyreg", "_reconstructor"),
            name("logging", "FileHandler"),
            name("logging", "FileHandler"),
            path,
        ),
        "__setstate__ by BUILD": namespace
        + b"}"
        + text("__setstate__")
        + system
        + b"sb"
        + touch
        + b"b",
        "pickle in a pickle": call(name("pickle", "loads"), raw(evil + b".")),
        "timeit": call(name("timeit", "timeit"), code, code, name("time", "time"), b"K\x01"),
        "call in the bytes of Python 2": python2_pickle.dumps({})[:-1] + evil + b"0",
        "call in a frame": b"\x80\x04\x95" + struct.pack("<Q", len(evil)) + evil,
        "after a valid part": pickle.dumps({"train": np.ones(3)}, 2)[:-1] + evil + b"\x86",
    }


LIVE = list(live_pickles("marker"))


@pytest.fixture
def extension():
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)
    copyreg._extension_cache.pop(EXTENSION, None)


@pytest.mark.parametrize("case", LIVE)
def test_hostile_pickles_never_run(case, tmp_path, extension):
    marker = tmp_path / "marker"
    data = live_pickles(marker)[case] + b"."
    refused(data, tmp_path)
    assert not marker.exists()
    # The payload is a real one: the stock reader runs it, whatever it raises afterwards. It also
    # leaves the extension in a cache, which must not open a door.
    with_stock_reader(data)
    assert marker.exists()
    marker.unlink()
    refused(data, tmp_path)
    assert not marker.exists()


def with_stock_reader(data):
    try:
        pickle.loads(data)
    except Exception:
        return


def refused(data, folder, says=""):
    """Loading gives a ValueError of one line that names the file, soon, in little memory."""
    path = folder / "clips.pkl"
    path.write_bytes(data)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(ValueError) as caught:
            safe_pickle.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and says in message
    assert len(message) < len(str(path)) + 250
    assert time.perf_counter() - begin < 5
    assert peak < 1e6 + 100 * len(data)


# Pickles that are broken, too large, or ask for what is not admitted without running anything


def laughs(depth, kind):
    """A list (or tuple) of ten times a list of ten times ..., in a few bytes."""
    data = text("ha")
    for _ in range(depth):
        data = b"(" + data + b"2" * 9 + kind
    return data + b"."


BYTEARRAY = name("builtins", "bytearray")


def copies(original, copy):
    """A list of what `copy` makes, 5,000 times, of the `original`, which it finds in the memo."""
    return original + b"q\x000(" + copy * 5_000 + b"l."


# Asks for what is not admitted, though running it would do no harm (STOP is added)
REFUSED = {
    "codecs.encode": (call(name("codecs", "encode"), text("a"), text("rot13")), "codecs"),
    "_codecs.encode otherwise": (call(name("_codecs", "encode"), text("a"), text("idna")), ""),
    "_codecs.encode of bytes": (call(name("_codecs", "encode"), raw(b"a"), text("latin1")), ""),
    "_codecs.decode": (call(name("_codecs", "decode"), raw(b"a"), text("latin1")), "_codecs"),
    "numpy.load": (call(name("numpy", "load"), text("/etc/passwd")), "numpy.load"),
    "numpy.fromfile": (call(name("numpy", "fromfile"), text("/etc/passwd")), "fromfile"),
    "look-alike module": (name("numpy.core.numeric", "_reconstruct"), "numeric._reconstruct"),
    "look-alike name": (name("numpy.core.multiarray", "_reconstruct "), "_reconstruct"),
    "attribute of an admitted name": (dotted("numpy._core.multiarray", "scalar.__class__"), ""),
    "dotted name over an admitted module": (dotted("numpy", "_core.multiarray.scalar"), ""),
    "name with a line break": (dotted("os\nsystem", "a\nb"), "os\\nsystem"),
    "name of a megabyte": (name("a" * 1_000_000, "b"), "..."),
    "bare callable": (SCALAR, "bare"),
    "bare dtype": (FLOAT, "bare"),
    "ndarray called": (call(name("numpy", "ndarray"), integer(10**12) + b"\x85"), "ndarray"),
    "too many arguments": (call(name("builtins", "bytes"), integer(10**12)), "broken"),
    "bytearray of a size": (call(name("builtins", "bytearray"), integer(10**12)), "bytearray"),
    "set of a text": (call(name("builtins", "set"), text("abc")), "set"),
    "complex of a text": (call(name("builtins", "complex"), text("1"), text("2")), "complex"),
    "array of another class": (
        call(RECONSTRUCT, name("numpy", "dtype"), b"K\x00\x85", raw(b"b")),
        "class",
    ),
    "terabytes of floats": (array_of(integer(2**40) + b"\x85", FLOAT, raw(b"")), "shape"),
    "terabytes of objects": (array_of(integer(2**40) + b"\x85", dtype_of("O8"), b"]"), "shape"),
    "shape beyond 64 bits": (array_of(b"(" + integer(2**62) * 4 + b"K\x00t", FLOAT, raw(b"")), ""),
    "negative shape": (array_of(integer(-1) + b"\x85", FLOAT, raw(b"")), "shape"),
    "shape of floats": (
        array_of(b"G" + struct.pack(">d", 1.0) + b"\x85", FLOAT, raw(bytes(4))),
        "shape",
    ),
    "shape of an array": (
        array_of(array_of(b")", dtype_of("i8"), raw(bytes(8))) + b"\x85", FLOAT, raw(b"")),
        "shape",
    ),
    "sixty axes": (array_of(b"(" + b"K\x01" * 60 + b"t", FLOAT, raw(bytes(4))), "shape"),
    "too little data": (array_of(b"K\x02\x85", FLOAT, raw(bytes(7))), "7 bytes"),
    "objects as raw pointers": (array_of(b"K\x01\x85", dtype_of("O8"), raw(bytes(8))), "object"),
    "objects from a buffer": (
        call(FROMBUFFER, raw(bytes(8)), dtype_of("O8"), b"K\x01\x85", text("C")),
        "object",
    ),
    "huge shape of a buffer": (
        call(FROMBUFFER, raw(bytes(8)), FLOAT, integer(2**40) + b"\x85", text("C")),
        "shape",
    ),
    "object scalar": (call(SCALAR, dtype_of("O8"), raw(bytes(8))), "scalar"),
    "array without a dtype": (array_of(b"K\x01\x85", text("f4"), raw(bytes(4))), "dtype"),
    "structured dtype": (dtype_of("V8"), "dtype"),
    "dtype with commas": (dtype_of("f4,O"), "dtype"),
    "dtype with a shape": (dtype_of("(1000,1000)f8"), "dtype"),
    "dtype that does not exist": (dtype_of("f7"), "broken"),
    "dtype with a line break": (dtype_of("f4\n"), "dtype"),
    "text of gigabytes an element": (dtype_of("U999999999"), "dtype"),
    "dtype of another size": (
        dtype_of(
            "S8", tuple_of(b"K\x03", text("|"), b"NNN", integer(2**40), integer(1), b"K\x00") + b"b"
        ),
        "dtype",
    ),
    "dtype with fields": (
        dtype_of(
            "f8",
            tuple_of(b"K\x03", text("<"), b"N", text("a") + b"\x85", b"}", STATE_SIZES, b"K\x00")
            + b"b",
        ),
        "dtype",
    ),
    "dtype with an odd byte order": (
        dtype_of("f8", tuple_of(b"K\x03", text("x"), b"NNN", STATE_SIZES, b"K\x00") + b"b"),
        "byte order",
    ),
    "empty text, endlessly often": (
        array_of(integer(2**40) + b"\x85", dtype_of("S0"), raw(b"")),
        "without size",
    ),
    "huge integer": (b"\x8b" + struct.pack("<I", 100_000) + b"\x01" * 100_000, "integer"),
    "object array in itself": (
        call(RECONSTRUCT, name("numpy", "ndarray"), b"K\x00\x85", raw(b"b"))
        + (b"q\x05" + tuple_of(b"K\x01", b"K\x01\x85", dtype_of("O8"), b"\x89", b"]h\x05a") + b"b"),
        "itself",
    ),
    "deep lists": (b"]" * 20_000 + b"a" * 19_999, "deep"),
    "deep tuples": (b")" + b"\x85" * 20_000, "deep"),
    "deep marks": (b"(" * 20_000, "broken"),
}

# Not what a writer of pickles writes
BROKEN = {
    "persistent id": (b"Pmarker\n.", "no part"),
    "persistent id, binary": (b"X\x01\x00\x00\x00aQ.", "no part"),
    "unknown opcode": (b"\xfe.", "no part"),
    "unknown extension": (b"\x82\x01.", "no part"),
    "buffer out of band": (b"\x80\x05\x97.", "no part"),
    "read-only buffer": (b"\x80\x05N\x98.", "no part"),
    "protocol 6": (b"\x80\x06N.", "protocol 6"),
    "name that is no text": (b"\x80\x04K\x01K\x02\x93.", "a name"),
    "callable as a key": (b"}" + name("numpy", "dtype") + b"Ns.", "key"),
    "call of a number": (b"K\x01)R.", "call"),
    "call of an array": (array_of(b")", FLOAT, raw(bytes(4))) + b")R.", "call"),
    "call without a tuple": (name("builtins", "set") + b"]R.", "call"),
    "state on a list": (b"]}" + text("__class__") + b"Nsb.", "state of a list"),
    "state on a callable": (
        name("builtins", "set") + b"}" + text("__globals__") + b"Nsb.",
        "state of a function",
    ),
    "state on an array is a dict": (array_of(b")", FLOAT, raw(bytes(4))) + b"}b.", "state"),
    "slots state": (b"]N}\x86b.", "state of a list"),
    "append to a dict": (b"}K\x01a.", "dict"),
    "set item of a list": (b"]K\x01K\x01s.", "list"),
    "add to a list": (b"\x80\x04](K\x01\x90.", "list"),
    "odd items": (b"}(K\x01u.", "broken"),
    "huge text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.", "cut off"),
    "huge bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"a.", "cut off"),
    "huge bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"a.", "cut off"),
    "huge frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.", "cut off"),
    "huge old bytes": (b"T" + struct.pack("<I", 2**32 - 1) + b"a.", "cut off"),
    "negative size of an integer": (b"\x8b\xff\xff\xff\xff\x01.", "integer"),
    "huge integer in digits": (b"L" + b"9" * 100_000 + b"L\n.", "integer"),
    "number that is none": (b"Fmarker\n.", "broken"),
    "string without quotes": (b"Smarker\n.", "string"),
    "text that is not UTF-8": (b"X\x02\x00\x00\x00\xff\xfe.", "broken"),
    "nothing in the memo": (b"h\x07.", "broken"),
    "memo of nothing": (b"q\x00.", "broken"),
    "nothing on the stack": (b".", "broken"),
    "no mark": (b"K\x01t.", "broken"),
    "open mark": (b"(K\x01.", "mark"),
    "two results": (b"K\x01K\x02.", "broken"),
    "list in itself": (b"]q\x00h\x00a.", "itself"),
    "dict in itself by way of a tuple": (b"}q\x00" + text("a") + b"h\x00\x85s.", "itself"),
    "billion laughs": (laughs(9, b"l"), "memory"),
    "endless laughs": (laughs(90, b"l"), "memory"),
    "endless laughs as a key": (b"}" + laughs(90, b"t")[:-1] + b"Ns.", "key"),
    "one text in many places": (b"(" + text("x" * 10_000) + b"2" * 20_000 + b"l.", "memory"),
    "one array in many places": (
        b"(" + array_of(b"M\x10\x27\x85", FLOAT, raw(bytes(40_000))) + b"2" * 20_000 + b"l.",
        "memory",
    ),
    "copies of a text": (copies(text("x" * 10_000), BYTEARRAY + b"h\x00\x85R"), "memory"),
    "copies that are thrown away": (
        copies(text("x" * 10_000), BYTEARRAY + b"h\x00\x85R0" + b"N"),
        "memory",
    ),
    "copies of a list as sets": (
        copies(
            b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(5000)) + b"e",
            name("builtins", "set") + b"h\x00\x85R",
        ),
        "memory",
    ),
    "copies of a text as arrays": (
        copies(text("x" * 60_000), array_of(b"M\x60\xea\x85", dtype_of("i1"), b"h\x00")),
        "memory",
    ),
    "long tuple as a key": (b"}(" + b"N" * 101 + b"tNs.", "key of 101"),
    "nested tuple as a key": (b"})\x85\x85Ns.", "key"),
    "array as a key": (b"}" + array_of(b")", FLOAT, raw(bytes(4))) + b"Ns.", "key"),
    "list in a set": (b"\x80\x04\x8f(]\x90.", "key"),
    "trailing bytes": (pickle.dumps({"train": 1}) + b"N.", "2 bytes follow"),
    "empty": (b"", "empty"),
    "not a pickle": (b"video,label\n", ""),
    "noise": (bytes(range(255, 0, -1)), "no part"),
    "zeros": (bytes(1000), "no part"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "gzip": (gzip.compress(pickle.dumps(1)), "gzip"),
    "npy": (b"\x93NUMPY\x01\x00", "npy"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_admitted_is_refused(case, tmp_path):
    data, says = REFUSED[case]
    refused(data + b".", tmp_path, says)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_and_oversized_pickles_are_refused(case, tmp_path):
    data, says = BROKEN[case]
    refused(data, tmp_path, says)


def test_zip_archives_and_torch_files_are_named(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    refused(buffer.getvalue(), tmp_path, "zip archive")


def test_depth_is_bounded_where_it_says(tmp_path):
    assert safe_pickle.loads(b")" + b"\x85" * (MAX_DEPTH - 1) + b".")
    refused(b")" + b"\x85" * MAX_DEPTH + b".", tmp_path, "deep")


def test_a_reader_does_not_wait_for_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent.pkl", tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError) as caught:
            safe_pickle.load(path)
        assert str(caught.value).startswith(f"cannot read {path}: ")
    with pytest.raises(FileNotFoundError):
        safe_pickle.load(tmp_path / "absent.pkl")


# What is read

CUBE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
VALUES = {
    **{f"array of {code}": np.array([0, 1, 100]).astype(code)
       for code in ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8",
                    "c16", "g", "U3", "S3", ">f4", ">i8", ">U3")},
    "C order": CUBE,
    "Fortran order": np.asfortranarray(CUBE),
    "moved axes": CUBE.transpose(1, 0, 2),
    "every other": CUBE[:, ::2],
    "backwards": CUBE[::-1],
    "no dimension": np.array(1.5),
    "empty": np.zeros((0, 3)),
    "long": np.arange(1000.0),
    "non-finite": np.array([np.nan, np.inf, -np.inf]),
    "object array of text": np.array(["a", "hé", None, b"x"], dtype=object),
    "object array of lists": np.array([[1], "a"], dtype=object),
    "object array of Fortran order": np.asfortranarray(np.array([["a", "b"], ["c", "d"]], object)),
    "scalars": [np.float32(1.5), np.float64(-1), np.int64(3), np.bool_(True), np.str_("hé"),
                np.str_(""), np.bytes_(b"x"), np.complex64(1j)],
    "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**100, -(2**100), 1.5, -0.0,
                1e300, 1 + 2j, True, False, None],
    "text": ["", "a", "hé€\U0001f600\n\\\x00", "\ud800", "x" * 300],
    "bytes": [b"", b"a", bytes(range(256)), b"x" * 300, bytearray(), bytearray(b"\xff\x00")],
    "containers": [[], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": [1]},
                   {1: 2, (1, "b"): 3}, set(), {1, 2}, frozenset(), frozenset({"a"}),
                   list(range(2000)), {str(i): i for i in range(2000)}],
}  # fmt: skip


def assert_same(x, y):
    assert type(x) is type(y)
    if isinstance(x, np.ndarray | np.generic):
        assert x.dtype == y.dtype and x.shape == y.shape
        if isinstance(x, np.ndarray):
            assert x.flags.f_contiguous == y.flags.f_contiguous
            assert x.flags.writeable == y.flags.writeable
        if x.dtype.hasobject:
            assert x.tolist() == y.tolist()
        else:
            np.testing.assert_array_equal(x, y)
    elif isinstance(x, list):
        for a, b in itertools.zip_longest(x, y):
            assert_same(a, b)
    else:
        assert repr(x) == repr(y)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("case", VALUES)
def test_reads_what_the_stock_reader_reads(case, protocol):
    data = pickle.dumps(VALUES[case], protocol)
    assert_same(safe_pickle.loads(data), pickle.loads(data))


@pytest.mark.parametrize("protocol", range(4))
def test_reads_the_names_of_old_and_new_numpy(protocol):
    value = {"x": CUBE, "y": np.array(["a"], object), "z": np.float32(2)}
    old = pickle.dumps(value, protocol).replace(b"numpy._core", b"numpy.core")
    new = old.replace(b"numpy.core", b"numpy._core")
    assert old != new
    for data in (old, new):
        for key, x in safe_pickle.loads(data).items():
            assert_same(x, value[key])


def test_reads_the_buffers_of_protocol_5_under_both_names():
    for module in ("numpy.core.numeric", "numpy._core.numeric"):
        order = [text("C"), text("F")]
        c, f = (
            safe_pickle.loads(
                call(name(module, "_frombuffer"), raw(np.arange(6, dtype="f4").tobytes()), FLOAT,
                     b"K\x02K\x03\x86", o) + b"."
            )
            for o in order
        )  # fmt: skip
        np.testing.assert_array_equal(c, [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(f, [[0, 2, 4], [1, 3, 5]])


def test_reads_python_2():
    value = {
        "train": {"x": CUBE, "id": [(b"abc", b"1.5", b"2")], "name": "ünï" * 100},
        "s": np.array([b"ab", b"c"]),
        "o": np.array(["a", "b"], object),
    }
    found = safe_pickle.loads(python2_pickle.dumps(value))
    assert_same(found["train"]["x"], CUBE)
    assert found["train"]["id"] == [("abc", "1.5", "2")]
    assert found["train"]["name"].encode("latin1").decode() == value["train"]["name"]
    assert_same(found["s"], value["s"])
    assert found["o"].tolist() == ["a", "b"]
    # Protocol 0 spells bytes as source code does.
    assert safe_pickle.loads(b"(S'it\\'s \\xff\\n'\np0\nI01\nL12L\nlp1\n.") == [
        "it's \xff\n", True, 12
    ]  # fmt: skip


def test_a_stream_may_share_its_parts():
    shared = ["a"]
    found = safe_pickle.loads(pickle.dumps([shared, shared, (shared,)]))
    assert found == [["a"], ["a"], (["a"],)] and found[0] is found[1]


def test_flags_of_a_dtype_are_not_believed():
    """Flag 63 says that the bytes are pointers to objects, which numpy would follow."""
    state = tuple_of(b"K\x03", text("|"), b"NNN", integer(8), integer(1), b"K\x3f") + b"b"
    data = array_of(b"K\x01\x85", dtype_of("S8", state), raw(b"x" * 8)) + b"."
    assert_same(safe_pickle.loads(data), np.array([b"x" * 8]))


def test_optimised_streams_are_read():
    data = pickletools.optimize(pickle.dumps({"train": [CUBE, "a"]}, 2))
    assert_same(safe_pickle.loads(data)["train"][0], CUBE)


# Damage

DATASET = {
    "train": {"text": CUBE, "id": ["a$_$1", "b$_$2"], "labels": np.array([0.4, -1.0])},
    "raw": np.array(["so", "good"], dtype=object),
    "more": [b"\xff\x00", 1.5, -3, 2**40, None, True, {1, 2}, (1, "hé")],
}


def damaged_sources():
    return [pickle.dumps(DATASET, p) for p in range(6)] + [python2_pickle.dumps({"a": CUBE[0]})]


@pytest.mark.parametrize("source", range(7))
def test_cut_off_at_every_byte(source):
    data = damaged_sources()[source]
    for end in range(len(data)):
        with pytest.raises(ValueError, match="the pickle"):
            safe_pickle.loads(data[:end])


def mutated(data, chance):
    """The same bytes after a few random changes: other bytes, missing, doubled or moved ones."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at, length = chance.randrange(len(data) + 1), chance.randint(1, 8)
        kind = chance.randrange(4)
        if kind == 0:
            data[at : at + length] = chance.randbytes(length)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + 1] = bytes([chance.choice(OPCODES)])
    return bytes(data)


OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of odd escapes in broken strings
def test_random_damage_gives_a_value_error_or_data():
    chance = random.Random(0)
    sources = damaged_sources()
    read = refused = 0
    begin = time.perf_counter()
    for _ in range(6000):
        try:
            safe_pickle.loads(mutated(chance.choice(sources), chance), "fuzz.pkl")
            read += 1
        except ValueError as error:
            assert type(error) is ValueError and "fuzz.pkl" in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert time.perf_counter() - begin < 60
    assert read > 100 and refused > 1000  # the damage is neither too mild nor too coarse
