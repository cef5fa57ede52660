"""A pickle is a program for a small stack machine; this is the machine, over records instead of objects.

A pickle names functions and classes and says what to call with what. Ordinary readers import the names and call
them. Here a name stays a `Name`, two strings; a call of it becomes an `Inert` record of name, arguments and state.
No module is imported on behalf of the file, no attribute of a real object is looked up or set, and nothing from
the file is called, so there is nothing to escape from. The few names in a table of makers, compared whole, are
acted out by functions of ours on plain data. Nothing recurses along the nesting of the file.

Opcodes: the standard library's `pickletools`, which parses and does not execute.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Inert", "Machine", "Maker", "Name", "Refused", "Session"]

#: Steps of all pickles of a file; the largest published checkpoints take a hundredth.
MOST_STEPS = 5_000_000
#: Bits of a number.
LONGEST = 1024
#: Files inside files: torch nests its own format once.
MOST_NESTED = 2
# Their mere presence says that the file is an attack. Nothing here depends on the list: no name is ever acted on.
_HOSTILE_MODULES = (
    "_pickle _posixsubprocess codeop ctypes importlib multiprocessing nt os pdb pickle posix pty runpy shutil "
    "socket subprocess sys timeit webbrowser"
)
_HOSTILE_BUILTINS = "__import__ breakpoint compile delattr eval exec execfile input open setattr"
_MARK = object()
_SCALARS = (str, bytes, int, float, complex, type(None))


class Name(NamedTuple):
    """A function or class as the file calls it; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Inert:
    """What the file would have made by calling ``name``: a record of the call and of what was put into it.

    Attributes:
        name: What was called.
        args: With what.
        state: What an object's attributes would have been.
        items, entries: What was appended, and what was set by key.
    """

    name: Name
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: list[tuple[Any, Any]] = field(default_factory=list)

    def build(self, machine: Machine, state: Any) -> None:
        """Take what the file would set as attributes."""
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}, not made>"


Maker = Callable[["Machine", tuple[Any, ...]], Any]


class Refused(Exception):
    """The file is damaged, or asks for what is not done; the message completes a sentence about it."""


class Session:
    """What all pickles of one file share: names met, and bounds on the steps and on the bytes that are made."""

    def __init__(self, size: int) -> None:
        self.names: set[str] = set()
        self._left, self._steps = 4 * size + (1 << 20), 0

    def step(self) -> None:
        """Count a step."""
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise Refused(f"has more than {MOST_STEPS} steps, more than any checkpoint; it is not read")

    def spend(self, count: int) -> None:
        """Count bytes before they are made."""
        self._left -= count
        if count < 0 or self._left < 0:
            raise Refused("announces more data than it holds; it is truncated, or made to fill the memory")


class Machine:
    """Reads one pickle.

    Args:
        stream: With ``read``, ``readline`` and ``tell``; a read beyond its end must give what is there.
        session: Shared by all pickles of a file.
        makers: What is acted out.
        nested: How many files this one is inside of.
        storage: Gives the storage of torch that the pickle refers to.
    """

    def __init__(
        self,
        stream: Any,
        session: Session,
        makers: Mapping[Name, Maker],
        nested: int = 0,
        storage: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if nested > MOST_NESTED:
            raise Refused("nests files inside files; it is not read")
        self.stream, self.session, self.makers = stream, session, makers
        self.nested, self.storage = nested, storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return what the pickle at the stream's place holds; the stream then stands behind it."""
        pushed = frozenset(_PUSHED.split())
        for code, argument, _ in pickletools.genops(self.stream):
            self.session.step()
            if code.name == "STOP":
                return self.stack.pop()
            if code.name in pushed:
                self.stack.append(_bounded(argument))
            elif code.name not in _IGNORED:
                step = _STEPS.get(code.name)
                if step is None:
                    raise Refused(f"uses {code.name}, which no checkpoint needs; it is not read")
                step(self, argument)
        raise Refused("ends too early; it is truncated")

    def marked(self) -> list[Any]:
        """Take what lies above the last mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Refused("is damaged")
        taken = self.stack[at + 1 :]
        del self.stack[at:]
        return taken

    def named(self, module: Any, name: Any) -> Name:
        """A function or class that the file names."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("is damaged")
        found = Name(module, name)
        hostile = module.split(".")[0] in _HOSTILE_MODULES.split()
        if hostile or (module in ("builtins", "__builtin__") and name in _HOSTILE_BUILTINS.split()):
            raise Refused(
                f"names {str(found)[:80]!r}, which no checkpoint needs and an attack does; nothing of it was run, "
                "do not open it elsewhere"
            )
        if found not in self.makers and module not in ("torch", "torch.storage", "numpy"):
            self.session.names.add(str(found)[:200])
        return found

    def call(self, called: Any, args: Any) -> Any:
        """Act out a call, or record it."""
        if not isinstance(called, Name) or not isinstance(args, tuple):
            # Calls of what calls return, or of an attribute, are recorded under what they start from.
            return Inert(called.name if isinstance(called, Inert) else Name("", "unknown"), (args,))
        maker = self.makers.get(called)
        return Inert(called, args) if maker is None else maker(self, args)

    def put(self, target: Any, pairs: list[Any]) -> None:
        """Set entries by key."""
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(target, Inert):
                target.entries.append((key, value))
                continue
            if not isinstance(target, dict):
                raise Refused("is damaged")
            # The hash of a nested tuple recurses; keys of checkpoints are flat.
            flat = key if isinstance(key, tuple) and not isinstance(key, Name) else (key,)
            if not all(isinstance(part, (*_SCALARS, Name, Inert)) for part in flat):
                raise Refused("has a dictionary whose keys are not names or numbers; it is not read")
            target[key] = value

    def add(self, target: Any, values: list[Any]) -> None:
        """Append to a list."""
        if isinstance(target, Inert):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise Refused("is damaged")


def _bounded(value: Any) -> Any:
    """Refuse what can be read and not be written again: half characters, and numbers of thousands of digits."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, int) and value.bit_length() > LONGEST:
        raise Refused("has a number of more digits than any checkpoint needs; it is not read")
    return value


def _build(m: Machine, _: Any) -> None:
    """Record the state of an object; what is no record keeps none (the metadata of a dictionary, say)."""
    state = m.stack.pop()
    target = m.stack[-1]
    if isinstance(target, Inert):
        target.build(m, state)


def _reduce(m: Machine, _: Any) -> None:
    args = m.stack.pop()
    m.stack.append(m.call(m.stack.pop(), args))


def _newobj_ex(m: Machine, _: Any) -> None:
    m.stack.pop()
    _reduce(m, _)


def _inst(m: Machine, argument: Any) -> None:
    args = tuple(m.marked())
    module, _, name = argument.partition(" ")
    m.stack.append(m.call(m.named(module, name), args))


def _obj(m: Machine, _: Any) -> None:
    called, *args = m.marked()
    m.stack.append(m.call(called, tuple(args)))


def _global(m: Machine, argument: Any) -> None:
    module, _, name = argument.partition(" ")
    m.stack.append(m.named(module, name))


def _stack_global(m: Machine, _: Any) -> None:
    name = m.stack.pop()
    m.stack.append(m.named(m.stack.pop(), name))


def _persistent(m: Machine, _: Any) -> None:
    given = m.stack.pop()
    if m.storage is None:
        raise Refused("refers to something outside of it; it is not read")
    m.stack.append(m.storage(given))


def _dict(m: Machine, _: Any) -> None:
    pairs = m.marked()
    new: dict[Any, Any] = {}
    m.put(new, pairs)
    m.stack.append(new)


def _setitems(m: Machine, _: Any) -> None:
    pairs = m.marked()
    m.put(m.stack[-1], pairs)


def _setitem(m: Machine, _: Any) -> None:
    pair = m.stack[-2:]
    del m.stack[-2:]
    m.put(m.stack[-1], pair)


def _appends(m: Machine, _: Any) -> None:
    values = m.marked()
    m.add(m.stack[-1], values)


def _append(m: Machine, _: Any) -> None:
    value = m.stack.pop()
    m.add(m.stack[-1], [value])


def _tuple_of(count: int) -> Callable[[Machine, Any], None]:
    def step(m: Machine, _: Any) -> None:
        if len(m.stack) < count:
            raise Refused("is damaged")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return step


_PUSHED = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
)
_IGNORED = frozenset(("PROTO", "FRAME"))
_STEPS: dict[str, Callable[[Machine, Any], Any]] = {
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_SET": lambda m, _: m.stack.append([]),
    "MARK": lambda m, _: m.stack.append(_MARK),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.marked(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "LIST": lambda m, _: m.stack.append(m.marked()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "FROZENSET": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "DICT": _dict,
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, a: m.stack.append(m.memo[a])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, a: m.memo.__setitem__(a, m.stack[-1])),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _newobj_ex,
    "BUILD": _build,
    "INST": _inst,
    "OBJ": _obj,
    "BINPERSID": _persistent,
}
