"""Pickles of bytes, truth values and arrays, interpreted opcode by opcode: a file calls nothing, whatever it holds.

An unpickler with a list of allowed names is no protection: NumPy's own constructors, called with arguments that a file
chooses, read and write wherever it says. Here a name only selects one of a few functions below, which look at their
arguments and build plain values. What Python 2 and 3 and NumPy before and after 2.0 write at protocols 0 to 5 is read;
Python 2's str, bytes and bytearray are all bytes here.

Memory stays below a small multiple of the file's size: what an array or a codec copies is paid for by the file's
bytes, each of which a codec and an array may copy once, and a file has few opcodes for its length.
"""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gif.errors import InputError

_FEW_VALUES = 1 << 20  # of any file
_BYTES_A_VALUE = 16  # of a larger one: an encoded image has hundreds of bytes, and a few dozen opcodes
_LONGEST_NUMBER = 20  # digits, of 64 bits and a sign
_LARGEST_NUMBER = 8  # bytes
_SHOWN = 80  # characters of a name, in a message
_NUMBERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"b1"}


@dataclass(frozen=True)
class Unread:
    """Something that is recognised, and of no use for images and truth values; ``name`` says what."""

    name: str


@dataclass
class Array:
    """A NumPy array: (k,) uint8 are bytes, others a list of their rows or numbers; None where it is of another kind."""

    value: bytes | list[Any] | None = None


@dataclass
class _DType:
    """uint8 is "u1", truth values "b1", objects "O8", strings of five bytes "S5", as NumPy spells them."""

    kind: str
    order: Literal["little", "big"] = "little"


@dataclass(frozen=True)
class _Name:
    """A name that the file refers to: a function of the interpreter to apply, or a class that is an argument."""

    name: str


def interpret(content: bytes) -> Any:
    """The value of a pickle: lists, tuples, bytes, str, int, bool, None, `Array`, or `Unread` for what has no use here.

    Raises ValueError, InputError above all, where it is damaged, needs anything else, or is larger than it should be.
    """
    return _Interpreter(content).run()


def type_name(value: Any) -> str:
    """Say in a few words, for messages, what a value of `interpret` is."""
    if isinstance(value, Unread):
        return value.name
    names = {Array: "ndarray", _DType: "dtype", _Name: "function"}
    return names.get(type(value), type(value).__name__)


def _shown(text: str) -> str:
    """Text of a file as it may stand in a message: short, and in one line that controls no terminal."""
    return text[:_SHOWN].encode("unicode_escape").decode("ascii")


class _Interpreter:
    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}
        self._bytes_left = 2 * len(content)
        self._values_left = max(_FEW_VALUES, len(content) // _BYTES_A_VALUE)

    def run(self) -> Any:
        while True:
            opcode = self._take(1)
            if opcode == pickle.STOP:
                return self._pop()
            step = _OPCODES.get(opcode)
            if step is None:
                raise InputError(
                    f"opcode {opcode!r} at byte {self._at - 1:,}, which images and truth values do not need"
                )
            self._spend(values=1)
            step(self)

    def _spend(self, *, values: int = 0, data: int = 0) -> None:
        """Count what is about to be made against the limit."""
        self._values_left -= values
        self._bytes_left -= data
        if self._values_left < 0 or self._bytes_left < 0:
            raise InputError(f"it would become far larger than its {len(self._content):,} bytes")

    # what the file's bytes say

    def _take(self, length: int) -> bytes:
        begin, self._at = self._at, self._at + length
        if self._at > len(self._content):
            raise InputError(f"it ends at byte {len(self._content):,}, wanted {self._at:,}: it is cut short")
        return self._content[begin : self._at]

    def _line(self) -> bytes:
        end = self._content.find(b"\n", self._at)
        if end < 0:
            raise InputError(f"the line at byte {self._at:,} does not end: it is cut short")
        return self._take(end + 1 - self._at)[:-1]

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _decimal(self) -> int:
        line = self._line().removesuffix(b"L")
        if len(line) > _LONGEST_NUMBER:
            raise InputError(f"a number of {len(line):,} digits")
        return int(line)

    def _counted(self, size: int) -> bytes:
        """Bytes after their number, which takes ``size`` bytes."""
        return self._take(self._unsigned(size))

    # the stack and the memo

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise InputError(f"nothing is on the stack at byte {self._at:,}: it is damaged")
        return self._stack.pop()

    def _pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self._pop() for _ in range(count)]))

    def _pop_mark(self) -> list[Any]:
        """Take everything off the stack that was pushed since the last mark."""
        if not self._marks:
            raise InputError(f"no mark is on the stack at byte {self._at:,}: it is damaged")
        height = self._marks.pop()
        values, self._stack[height:] = self._stack[height:], []
        return values

    def _pop_all_but_one(self) -> tuple[Any, list[Any]]:
        """Return what lies below the last mark, which stays there, and take off everything since."""
        values = self._pop_mark()
        return self._top(), values

    def _top(self) -> Any:
        top = self._pop()
        self._push(top)
        return top

    def _keep(self, key: int) -> None:
        self._memo[key] = self._top()

    def _fetch(self, key: int) -> None:
        if key not in self._memo:
            raise InputError(f"it refers to value {key}, which it never made")
        self._push(self._memo[key])

    # what opcodes do, where it is more than a push

    def _integer(self) -> None:
        """Protocol 0 writes truth values as the numbers 00 and 01."""
        at = self._at
        number = self._decimal()
        truth = self._content[at : self._at] in (b"00\n", b"01\n")
        self._push(bool(number) if truth else number)

    def _long(self) -> None:
        length = self._unsigned(1)
        if length > _LARGEST_NUMBER + 1:
            raise InputError(f"a number of {length} bytes")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _quoted(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            raise InputError(f"a string without quotes before byte {self._at:,}: it is damaged")
        self._push(codecs.escape_decode(line[1:-1])[0])  # as pickle reads Python 2's

    def _extend(self, values: list[Any]) -> None:
        top = self._top()
        if not isinstance(top, list):
            raise InputError(f"it appends to a {type_name(top)}: it is damaged")
        top += values

    def _appends(self) -> None:
        values = self._pop_mark()
        self._extend(values)

    def _set_items(self, count: int | None) -> None:
        if count is None:
            self._pop_mark()
        else:
            self._pop_many(count)
        if self._top() != Unread("dict"):
            raise InputError(f"it sets items of a {type_name(self._top())}: it is damaged")

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise InputError(f"it refers to a {type_name(module)} by a {type_name(name)}: it is damaged")
        if (module, name) not in _NAMES:
            raise InputError(f"it refers to {_shown(f'{module}.{name}')}, which images and truth values do not need")
        self._push(_Name(_NAMES[module, name]))

    def _name_in_lines(self) -> None:
        self._name(self._line().decode(), self._line().decode())

    def _reduce(self) -> None:
        function, arguments = self._pop_many(2)
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise InputError(f"it calls a {type_name(function)}: it is damaged")
        match function.name, arguments:
            case (("bytes" | "bytearray"), ()):
                self._push(b"")
            case (("encode" | "bytearray"), (str(text), str("latin1" | "latin-1") | bytes(b"latin1" | b"latin-1"))):
                self._spend(data=len(text))
                self._push(text.encode("latin-1"))
            case "encode", (str(), codec):
                raise InputError(f"the codec {_shown(str(codec))} is not allowed")
            case "bytearray", (bytes(data),):
                self._push(data)
            case "reconstruct", (_Name("ndarray"), tuple(), str() | bytes()):
                self._push(Array())
            case "dtype", (str() | bytes() as kind, *_):
                self._push(_DType(kind if isinstance(kind, str) else kind.decode("ascii")))
            case "scalar", (_DType() as dtype, bytes(data)):
                values = self._elements(dtype, 1, data)
                self._push(Unread(dtype.kind) if values is None else values[0])
            case "frombuffer", (bytes(data), _DType() as dtype, tuple(shape), str(order)):
                self._push(Array(self._array(shape, dtype, order != "C", data)))
            case name, _:
                raise InputError(f"it calls {name} with {', '.join(map(type_name, arguments))}, as no real file does")

    def _build(self) -> None:
        target, state = self._pop_many(2)
        match target, state:
            case Array(), (*_, tuple(shape), _DType() as dtype, fortran, bytes() | list() as data) if len(state) <= 5:
                target.value = self._array(shape, dtype, bool(fortran), data)
            case _DType(), (int(), ("<" | ">" | "|" | b"<" | b">" | b"|") as order, *_):
                target.order = "big" if order in (">", b">") else "little"
            case _:
                raise InputError(f"a {type_name(target)} with a state that no real file gives it")
        self._push(target)

    # arrays

    def _array(
        self, shape: tuple[Any, ...], dtype: _DType, fortran: bool, data: bytes | list[Any]
    ) -> bytes | list[Any] | None:
        """The value of an `Array`. Raises ValueError where the data does not fill the shape."""
        if not all(type(side) is int and side >= 0 for side in shape):
            raise InputError(f"an array of the shape {', '.join(map(type_name, shape))}")
        if dtype.kind == "u1" and isinstance(data, bytes):
            if len(shape) == 1 and shape[0] == len(data):
                return data
            if len(shape) == 2 and shape[0] * shape[1] == len(data) and not fortran:
                self._spend(values=shape[0], data=len(data))
                return [Array(data[row * shape[1] :][: shape[1]]) for row in range(shape[0])]
        if len(shape) != 1:
            return None
        return self._elements(dtype, shape[0], data)

    def _elements(self, dtype: _DType, count: int, data: bytes | list[Any]) -> list[Any] | None:
        """The numbers, strings or objects of an array (count,); None for others."""
        self._spend(values=count)
        if isinstance(data, list):
            if len(data) != count or dtype.kind not in ("O", "O4", "O8"):
                raise InputError(f"an array of {count:,} {dtype.kind} holds {len(data):,} values")
            return data
        strings = dtype.kind[:1] == "S" and dtype.kind[1:].isdecimal() and len(dtype.kind) <= _LONGEST_NUMBER
        if not strings and dtype.kind not in _NUMBERS:
            return None
        size = int(dtype.kind[1:])
        if count * size != len(data) or not size:
            raise InputError(f"an array of {count:,} {dtype.kind} holds {len(data):,} bytes")
        if strings:
            self._spend(data=len(data))
            return [data[place * size :][:size].rstrip(b"\0") for place in range(count)]
        numbers: list[Any] = np.frombuffer(data, f"{'>' if dtype.order == 'big' else '<'}{dtype.kind}").tolist()
        return numbers


_CORES = ("numpy.core", "numpy._core")
_NAMES = {
    ("_codecs", "encode"): "encode",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    **{(module, name): name for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    **{(f"{core}.multiarray", "_reconstruct"): "reconstruct" for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): "scalar" for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): "frombuffer" for core in _CORES},
}
"""What a pickle of bytes, numbers and NumPy arrays refers to, under its old and new names, by what it means here."""


def _pushes(value: Callable[[_Interpreter], Any]) -> Callable[[_Interpreter], None]:
    return lambda self: self._push(value(self))


_OPCODES: dict[bytes, Callable[[_Interpreter], Any]] = {
    pickle.PROTO: lambda self: self._take(1),
    pickle.FRAME: lambda self: self._take(8),
    pickle.MARK: lambda self: self._marks.append(len(self._stack)),
    pickle.POP: lambda self: self._pop(),
    pickle.POP_MARK: lambda self: self._pop_mark(),
    pickle.DUP: lambda self: self._push(self._top()),
    pickle.PUT: lambda self: self._keep(self._decimal()),
    pickle.BINPUT: lambda self: self._keep(self._unsigned(1)),
    pickle.LONG_BINPUT: lambda self: self._keep(self._unsigned(4)),
    pickle.MEMOIZE: lambda self: self._keep(len(self._memo)),
    pickle.GET: lambda self: self._fetch(self._decimal()),
    pickle.BINGET: lambda self: self._fetch(self._unsigned(1)),
    pickle.LONG_BINGET: lambda self: self._fetch(self._unsigned(4)),
    pickle.NONE: lambda self: self._push(None),
    pickle.NEWTRUE: lambda self: self._push(True),
    pickle.NEWFALSE: lambda self: self._push(False),
    pickle.INT: lambda self: self._integer(),
    pickle.LONG: _pushes(lambda self: self._decimal()),
    pickle.LONG1: lambda self: self._long(),
    pickle.BININT: _pushes(lambda self: int.from_bytes(self._take(4), "little", signed=True)),
    pickle.BININT1: _pushes(lambda self: self._unsigned(1)),
    pickle.BININT2: _pushes(lambda self: self._unsigned(2)),
    pickle.FLOAT: _pushes(lambda self: (self._line(), Unread("float"))[1]),
    pickle.BINFLOAT: _pushes(lambda self: (self._take(8), Unread("float"))[1]),
    pickle.STRING: lambda self: self._quoted(),
    pickle.SHORT_BINSTRING: _pushes(lambda self: self._counted(1)),
    pickle.BINSTRING: _pushes(lambda self: self._counted(4)),
    pickle.SHORT_BINBYTES: _pushes(lambda self: self._counted(1)),
    pickle.BINBYTES: _pushes(lambda self: self._counted(4)),
    pickle.BINBYTES8: _pushes(lambda self: self._counted(8)),
    pickle.BYTEARRAY8: _pushes(lambda self: self._counted(8)),
    pickle.UNICODE: _pushes(lambda self: self._line().decode("raw-unicode-escape")),
    pickle.SHORT_BINUNICODE: _pushes(lambda self: self._counted(1).decode("utf-8", "surrogatepass")),
    pickle.BINUNICODE: _pushes(lambda self: self._counted(4).decode("utf-8", "surrogatepass")),
    pickle.BINUNICODE8: _pushes(lambda self: self._counted(8).decode("utf-8", "surrogatepass")),
    pickle.EMPTY_LIST: lambda self: self._push([]),
    pickle.LIST: _pushes(lambda self: self._pop_mark()),
    pickle.APPEND: lambda self: self._extend([self._pop()]),
    pickle.APPENDS: lambda self: self._appends(),
    pickle.EMPTY_TUPLE: lambda self: self._push(()),
    pickle.TUPLE: _pushes(lambda self: tuple(self._pop_mark())),
    pickle.TUPLE1: _pushes(lambda self: self._pop_many(1)),
    pickle.TUPLE2: _pushes(lambda self: self._pop_many(2)),
    pickle.TUPLE3: _pushes(lambda self: self._pop_many(3)),
    pickle.EMPTY_DICT: lambda self: self._push(Unread("dict")),
    pickle.DICT: _pushes(lambda self: (self._pop_mark(), Unread("dict"))[1]),
    pickle.SETITEM: lambda self: self._set_items(2),
    pickle.SETITEMS: lambda self: self._set_items(None),
    pickle.GLOBAL: lambda self: self._name_in_lines(),
    pickle.STACK_GLOBAL: lambda self: self._name(*self._pop_many(2)),
    pickle.REDUCE: lambda self: self._reduce(),
    pickle.BUILD: lambda self: self._build(),
}
