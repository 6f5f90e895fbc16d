"""Pickles read as plain data: nothing is imported or called, and no attribute is set.

An interpreter of the few opcodes that ``torch.save`` and ``torch.distributed.checkpoint`` write. A
pickle's import becomes only a :class:`Name`, a call only a :class:`Record`: the caller decides what
they mean.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from moco_scale.untrusted.limits import PICKLE_DEPTH, PICKLE_STEPS, PICKLE_TEXT
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

ORDERED_DICT = "collections OrderedDict"
PERSISTENT = "persistent"
"""The ``kind`` of a record that stands for something outside of the pickle."""


class PickleError(UserError):
    """Damaged pickle, or none of the kind read here."""


class ForeignError(PickleError):
    """Pickle with content that no file of this program has, and that would run code elsewhere."""


class Name(NamedTuple):
    """Name that the pickle would import: ``"module name"``."""

    text: str


@dataclass(eq=False, slots=True)
class Record:
    """Call or object that the pickle would make: its kind, arguments, and state if it has one."""

    kind: str
    args: Any
    state: Any = None


Plain = Any
"""None, bool, int, float, str, Name, Record, and tuples, lists and dicts (keys: str, int, Record)
of these: a tree, though parts of it may be the same object."""


def read_pickle(content: bytes, names: frozenset[str]) -> Plain:
    """Read a pickle of protocol 2 to 5; the caller has checked its size.

    Args:
        content: the whole pickle; nothing may follow its end.
        names: allowed names, each as ``"module name"``.

    Raises:
        ForeignError: It has any other name, or another use of these.
        PickleError: It is damaged, or larger inside than any is.
    """
    try:
        value = _Machine(content, names).run()
        _require_tree(value)
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise PickleError("it is damaged or no pickle") from None
    return value


_MARK = object()
_INTEGERS = {b"J": "<i", b"K": "<B", b"M": "<H"}
_ARGUMENTS = {b"q": "<B", b"h": "<B", b"r": "<I", b"j": "<I"}


class _Machine:
    def __init__(self, content: bytes, names: frozenset[str]) -> None:
        self.content, self.names = content, names
        self.place = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Plain:
        for _ in range(PICKLE_STEPS):
            code = self.take(1)
            if code == b".":
                (value,) = self.stack
                if self.place != len(self.content):
                    raise ValueError
                return value
            action = _ACTIONS.get(code)
            if action is None:
                raise ForeignError(
                    f"it has the opcode {code!r}, which no such file contains; nothing was run"
                )
            action(self, code)
        raise PickleError(f"it has more than {PICKLE_STEPS:,} parts, which none needs")

    def take(self, size: int) -> bytes:
        part = self.content[self.place : self.place + size]
        if len(part) != size:
            raise ValueError
        self.place += size
        return part

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, size: int) -> str:
        if size > PICKLE_TEXT:
            raise PickleError(f"it has a text of more than {PICKLE_TEXT:,} bytes")
        return self.take(size).decode("utf-8", "surrogatepass")  # as it was written

    def line(self) -> str:
        end = self.content.index(b"\n", self.place, self.place + 256)
        line = self.take(end + 1 - self.place)
        return line[:-1].decode("ascii")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError
        return value

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def name(self, module: Any, name: Any) -> None:
        text = f"{module} {name}"
        if text not in self.names:
            shown = printable(text.replace(" ", "."), 100)
            raise ForeignError(f"it names {shown}, which no such file contains; nothing was run")
        self.stack.append(Name(text))


def _skip(machine: _Machine, code: bytes) -> None:
    if code == b"\x95":  # FRAME: how much follows, for who reads ahead
        if machine.number("<Q") > len(machine.content) - machine.place:
            raise ValueError
    elif not 2 <= machine.number("<B") <= 5:  # PROTO
        raise ValueError


def _constant(machine: _Machine, code: bytes) -> None:
    machine.stack.append({b"N": None, b"\x88": True, b"\x89": False}[code])


def _empty(machine: _Machine, code: bytes) -> None:
    machine.stack.append({b")": tuple, b"]": list, b"}": dict}[code]())


def _mark(machine: _Machine, code: bytes) -> None:
    machine.stack.append(_MARK)


def _integer(machine: _Machine, code: bytes) -> None:
    if code == b"\x8a":  # LONG1
        size = machine.number("<B")
        machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))
    else:
        machine.stack.append(machine.number(_INTEGERS[code]))


def _float(machine: _Machine, code: bytes) -> None:
    machine.stack.append(struct.unpack(">d", machine.take(8))[0])


def _string(machine: _Machine, code: bytes) -> None:
    machine.stack.append(machine.text(machine.number("<I" if code == b"X" else "<B")))


def _tuple(machine: _Machine, code: bytes) -> None:
    if code == b"t":
        machine.stack.append(tuple(machine.since_mark()))
    else:
        size = code[0] - 0x84
        machine.stack.append(tuple(reversed([machine.pop() for _ in range(size)])))


def _append(machine: _Machine, code: bytes) -> None:
    values = machine.since_mark() if code == b"e" else [machine.pop()]
    target = machine.stack[-1]
    if type(target) is not list:
        raise ValueError
    target.extend(values)


def _set_items(machine: _Machine, code: bytes) -> None:
    if code == b"u":
        values = machine.since_mark()
    else:
        value = machine.pop()
        values = [machine.pop(), value]
    target = machine.stack[-1]
    if type(target) is not dict or len(values) % 2:
        raise ValueError
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, int, Record) or key in target:
            raise ValueError
        target[key] = value


def _put(machine: _Machine, code: bytes) -> None:
    at = len(machine.memo) if code == b"\x94" else machine.number(_ARGUMENTS[code])
    value = machine.stack[-1]
    if value is _MARK:
        raise ValueError
    machine.memo[at] = value


def _get(machine: _Machine, code: bytes) -> None:
    machine.stack.append(machine.memo[machine.number(_ARGUMENTS[code])])


def _global(machine: _Machine, code: bytes) -> None:
    if code == b"c":
        module = machine.line()
        machine.name(module, machine.line())
    else:
        name, module = machine.pop(), machine.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError
        machine.name(module, name)


def _call(machine: _Machine, code: bytes) -> None:
    """Handle REDUCE, which would call, and NEWOBJ, which would make an object."""
    args, what = machine.pop(), machine.pop()
    if type(args) is not tuple:
        raise ValueError
    if type(what) is not Name:
        raise ForeignError("it calls what is no name; nothing was run")
    if what.text == ORDERED_DICT and not args:
        machine.stack.append({})
    else:
        machine.stack.append(Record(what.text, args))


def _build(machine: _Machine, code: bytes) -> None:
    state, target = machine.pop(), machine.stack[-1]
    if type(target) is dict:
        return  # of an OrderedDict: attributes of torch's that say nothing of its content
    if type(target) is not Record or target.state is not None or target.kind == PERSISTENT:
        raise ForeignError("it sets attributes on what is no object of its own; nothing was run")
    target.state = state


def _persistent(machine: _Machine, code: bytes) -> None:
    machine.stack.append(Record(PERSISTENT, machine.pop()))


_ACTIONS: dict[bytes, Callable[[_Machine, bytes], None]] = {
    code: action
    for action, codes in (
        (_skip, (b"\x80", b"\x95")),
        (_constant, (b"N", b"\x88", b"\x89")),
        (_empty, (b")", b"]", b"}")),
        (_mark, (b"(",)),
        (_integer, (b"J", b"K", b"M", b"\x8a")),
        (_float, (b"G",)),
        (_string, (b"X", b"\x8c")),
        (_tuple, (b"t", b"\x85", b"\x86", b"\x87")),
        (_append, (b"a", b"e")),
        (_set_items, (b"s", b"u")),
        (_put, (b"q", b"r", b"\x94")),
        (_get, (b"h", b"j")),
        (_global, (b"c", b"\x93")),
        (_call, (b"R", b"\x81")),
        (_build, (b"b",)),
        (_persistent, (b"Q",)),
    )
    for code in codes
}


def _require_tree(value: Plain) -> None:
    """Refuse values that contain themselves, or that shared objects make too large.

    So every walk through the value comes to an end.
    """
    seen = 1
    pending = [(value, 0)]
    while pending:
        each, depth = pending.pop()
        if type(each) is dict:
            inner = [*each.keys(), *each.values()]
        elif type(each) in (list, tuple):
            inner = list(each)
        elif type(each) is Record:
            inner = [each.args, each.state]
        else:
            continue
        seen += len(inner)
        if depth >= PICKLE_DEPTH or seen > PICKLE_STEPS:
            raise PickleError("it is nested more deeply, or larger inside, than any such file")
        pending += [(part, depth + 1) for part in inner]
