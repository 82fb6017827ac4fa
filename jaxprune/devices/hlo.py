"""What a compiled program does, read from its optimised HLO: moved arrays, collectives, cycles.

HLO is XLA's own text: computations of instructions, one a line, `%name = shape op(operands)`.
A fusion is one instruction that calls a computation; what that one ends with is what is written.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^  (ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_OP = re.compile(r"\}?\)? ?([a-z][a-z0-9\-]*)\(")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

# What writes an array elsewhere, or in another order, without computing anything.
MOVES = ("copy", "copy-start", "transpose", "pad", "concatenate", "reverse")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
               "ragged-all-to-all", "collective-broadcast")  # fmt: skip


class Shape(NamedTuple):
    """An array: its dtype, its sizes, and whether it lies in a chip's main memory."""

    dtype: str
    sizes: tuple[int, ...]
    in_memory: bool

    @property
    def bytes(self) -> int:
        return _ITEM.get(self.dtype, 0) * math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    cycles: int
    constant: int | None


@dataclasses.dataclass(frozen=True)
class Written:
    """An array that a program writes to memory: by what, how large, how many times."""

    op: str
    shape: str
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program does, as far as its text tells.

    Attributes:
        cycles: that a TPU's compiler estimates for all its fusions; 0 where it does not.
        moved: arrays over some size that are only moved, the largest first.
        written: the largest arrays that are written to memory, computed or moved.
        collectives: of every kind, how many and of how many bytes.
    """

    cycles: int
    moved: tuple[Written, ...]
    written: tuple[Written, ...]
    collectives: Mapping[str, tuple[int, int]]


def read_program(text: str, *, least: int, most_written: int = 8, rounds: int = 1) -> Program:
    """Read a program.

    Args:
        text: what `as_text()` gives of what is compiled.
        least: bytes from which on a moved array is noted down.
        most_written: how many of the largest arrays are noted down.
        rounds: of loops whose length the text does not tell.
    """
    computations, entry = _parse(text)
    cycles, moved, written = 0, [], []
    collectives: dict[str, tuple[int, int]] = {}
    for instruction, times in _executed(computations, entry, rounds):
        cycles += times * instruction.cycles
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            number, size = collectives.get(kind, (0, 0))
            # A started collective gives its operands too.
            own = max((shape.bytes for shape in instruction.shapes), default=0)
            collectives[kind] = (number + times, size + times * own)
        for op, shape in _writes(instruction, computations):
            one = Written(op, str(shape), shape.bytes, times)
            if op in MOVES and shape.bytes >= least:
                moved.append(one)
            written.append(one)
    order = functools.partial(sorted, key=lambda one: -one.bytes * one.times)
    largest = sorted(set(written), key=lambda one: -one.bytes)[:most_written]
    return Program(cycles, tuple(order(moved)), tuple(largest), collectives)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions by computation, and the name of the one that is run."""
    computations: dict[str, list[Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            inside = found[2]
            computations[inside] = []
            entry = inside if found[1] else entry
        elif inside is not None and (found := _INSTRUCTION.match(line)):
            computations[inside].append(_instruction(found[2], found[3]))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    head = rest.split(", metadata=")[0].split(", backend_config=")[0]
    type_ = _type_of(head)
    after = head[len(type_) :].lstrip()
    op, _, arguments = after.partition("(")
    cycles = _CYCLES.search(rest)
    number = re.match(r"(-?\d+)\)", arguments) if op == "constant" else None
    return Instruction(
        name,
        op,
        tuple(_shapes(type_)),
        tuple(re.findall(r"%([\w.\-]+)", arguments.split("), ")[0])),
        tuple(_CALLS.findall(rest)),
        int(cycles[1]) if cycles else 0,
        int(number[1]) if number else None,
    )


def _type_of(head: str) -> str:
    """The result's type, in front of the operation: an array's, or several in parentheses."""
    if not head.startswith("("):
        return head.split(" ", 1)[0]
    depth = 0
    for place, letter in enumerate(head):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return head[: place + 1]
    return head


def _shapes(type_: str) -> Iterator[Shape]:
    for dtype, sizes, layout in _ARRAY.findall(type_):
        if dtype in _ITEM:
            spaces = re.findall(r"S\((\d+)\)", layout)
            yield Shape(dtype, tuple(int(n) for n in sizes.split(",") if n), not spaces)


def _executed(
    computations: Mapping[str, Sequence[Instruction]], name: str, rounds: int, times: int = 1
) -> Iterator[tuple[Instruction, int]]:
    """The instructions that run, and how often; a loop of unknown length has so many rounds."""
    for instruction in computations.get(name, ()):
        yield instruction, times
        if instruction.op == "while":
            body, condition = _of_loop(instruction, computations)
            trips = _trips(computations.get(condition, ())) or rounds
            yield from _executed(computations, body, rounds, times * trips)
        elif instruction.op in ("call", "conditional", "async-start"):
            for called in instruction.calls:
                yield from _executed(computations, called, rounds, times)


def _of_loop(
    loop: Instruction, computations: Mapping[str, Sequence[Instruction]]
) -> tuple[str, str]:
    """The computations of a loop: what it repeats, and what it asks before."""
    first, second = loop.calls[:2]
    is_condition = bool(computations[first]) and [str(x) for x in _root(computations[first]).shapes]
    return (second, first) if is_condition == ["pred[]"] else (first, second)


def _root(computation: Sequence[Instruction]) -> Instruction:
    return computation[-1]


def _trips(condition: Sequence[Instruction]) -> int:
    """How often a loop runs that counts up to a constant; 0 where nothing says."""
    constants = [one.constant for one in condition if one.constant is not None]
    return constants[0] if len(constants) == 1 and len(condition) <= 6 else 0


def _writes(
    instruction: Instruction, computations: Mapping[str, Sequence[Instruction]]
) -> Iterator[tuple[str, Shape]]:
    """What an instruction writes to memory, and what the last operation was that made it."""
    if instruction.op in ("parameter", "tuple", "get-tuple-element", "while", "bitcast", "constant",
                          "conditional", "call", "copy-done", "async-start", "async-done",
                          "opt-barrier"):  # fmt: skip
        return
    shapes, ops = instruction.shapes, [instruction.op] * len(instruction.shapes)
    if instruction.op == "copy-start":  # gives where it copies to, from where, and a context
        shapes = shapes[:1]
    if instruction.op == "fusion" and instruction.calls:
        inside = {one.name: one for one in computations.get(instruction.calls[0], ())}
        if inside:
            root = _root(computations[instruction.calls[0]])
            ends = [inside.get(name, root) for name in root.operands]
            ends = ends if root.op == "tuple" else [root]
            ops = [_last_op(end, inside) for end in ends]
    for op, shape in zip(ops, shapes, strict=False):
        if shape.in_memory:
            yield op, shape


def _last_op(end: Instruction, inside: Mapping[str, Instruction]) -> str:
    """The operation before those that move nothing."""
    while end.op in ("bitcast", "reshape", "convert") and end.operands[0] in inside:
        end = inside[end.operands[0]]
    return end.op
