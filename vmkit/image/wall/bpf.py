"""BPF programs as bytes: the few instructions that ours need, and labels for their jumps.

The encoding is that of Documentation/bpf/standardization/instruction-set.rst: 8 bytes each, `opcode, destination and
source register, offset, immediate`, little-endian. Pure.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_INSTRUCTION = struct.Struct("<BBhi")
# R0 is what is returned, R1 to R5 are arguments (a call leaves nothing in them), R10 is the top of the stack.
R0, R1, R2, R3, R10 = 0, 1, 2, 3, 10


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; with `to`, a jump to that label."""

    opcode: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    immediate: int = 0
    to: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """A place to jump to."""

    name: str


def load16(destination: int, source: int, offset: int) -> Instruction:
    """destination = the 16 bits at source + offset, zeros above."""
    return Instruction(0x69, destination, source, offset)


def load32(destination: int, source: int, offset: int) -> Instruction:
    """The same for 32 bits."""
    return Instruction(0x61, destination, source, offset)


def load64(destination: int, source: int, offset: int) -> Instruction:
    """The same for 64 bits."""
    return Instruction(0x79, destination, source, offset)


def set_value(destination: int, value: int) -> Instruction:
    """destination = value, its sign extended to 64 bits."""
    return Instruction(0xB7, destination, immediate=value)


def copy(destination: int, source: int) -> Instruction:
    """destination = source."""
    return Instruction(0xBF, destination, source)


def add(destination: int, value: int) -> Instruction:
    """destination += value, its sign extended to 64 bits."""
    return Instruction(0x07, destination, immediate=value)


def call(helper: int) -> Instruction:
    """R0 = helper(R1, ...), by its number in linux/bpf.h."""
    return Instruction(0x85, immediate=helper)


def jump_if_equal32(register: int, value: int, to: str) -> Instruction:
    """Jumps when the lower 32 bits of a register are value."""
    return Instruction(0x16, register, immediate=as_signed32(value), to=to)


def jump_if_not_equal32(register: int, value: int, to: str) -> Instruction:
    """Jumps when they are not."""
    return Instruction(0x56, register, immediate=as_signed32(value), to=to)


def jump_if_less32(register: int, value: int, to: str) -> Instruction:
    """Jumps when the lower 32 bits of a register, without a sign, are less than value."""
    return Instruction(0xA6, register, immediate=as_signed32(value), to=to)


def leave() -> Instruction:
    """Returns R0."""
    return Instruction(0x95)


def assemble(program: Sequence[Instruction | Label]) -> bytes:
    """The program's bytes. Every label that is jumped to must be there, behind the jump."""
    places: dict[str, int] = {}
    instructions: list[Instruction] = []
    for item in program:
        if isinstance(item, Label):
            places[item.name] = len(instructions)
        else:
            instructions.append(item)
    return b"".join(
        _INSTRUCTION.pack(
            item.opcode,
            item.destination | item.source << 4,
            # Counted from the instruction after the jump.
            places[item.to] - index - 1 if item.to else item.offset,
            item.immediate,
        )
        for index, item in enumerate(instructions)
    )


def as_signed32(value: int) -> int:
    """The number whose 32 bits are those of value: immediates have a sign."""
    return value - (1 << 32) if value >= 1 << 31 else value
