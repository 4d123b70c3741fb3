"""A reading of BPF of the tests' own: decodes programs, and runs them against a call of a socket hook.

Made from the instruction set's specification alone, and as strict as the kernel's verifier where ours could err: no
register or byte of the stack is read before it is written, no jump goes back, a call leaves nothing in R1 to R5.
"""

import struct
from dataclasses import dataclass, field

CONTEXT, ADDRESS, STACK = 0x1000_0000, 0x2000_0000, 0x3000_0000
STACK_BYTES = 512
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
SIZES = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}


@dataclass
class Call:
    """One connect() or bind() as the kernel sees it. uid: the real one, in the initial user namespace."""

    address: bytes
    length: int | None = None
    uid: int = 0


@dataclass
class BpfMachine:
    """run(call) gives what the program returns, as a signed number."""

    program: bytes
    registers: dict[int, int] = field(default_factory=dict)
    stack: dict[int, int] = field(default_factory=dict)
    read_bytes: int = 0

    def run(self, call: Call) -> int:
        assert len(self.program) % 8 == 0
        self.registers = {1: CONTEXT, 10: STACK + STACK_BYTES}
        self.stack = {}
        at = 0
        while True:
            opcode, registers, offset, immediate = struct.unpack_from("<BBhi", self.program, at * 8)
            destination, source = registers & 0xF, registers >> 4
            at += 1
            kind = opcode & 0x07
            if opcode == 0x95:
                value = self.registers[0]
                return value - (1 << 64) if value >> 63 else value
            if opcode == 0x85:
                self._call(immediate, call)
            elif kind == 0x01:
                size = SIZES[opcode & 0x18]
                self.registers[destination] = self._load(self.registers[source] + offset, size, call)
            elif kind == 0x07:
                self._compute(opcode, destination, source, immediate)
            elif kind in (0x05, 0x06):
                assert offset >= 0, "a jump back"
                at += offset if self._compare(opcode, destination, immediate) else 0
            else:
                raise AssertionError(f"opcode {opcode:#x}")

    def _compute(self, opcode: int, destination: int, source: int, immediate: int) -> None:
        operand = self.registers[source] if opcode & 0x08 else immediate
        match opcode & 0xF0:
            case 0xB0:
                self.registers[destination] = operand & MASK64
            case 0x00:
                self.registers[destination] = self.registers[destination] + operand & MASK64
            case _:
                raise AssertionError(f"arithmetic {opcode:#x}")

    def _compare(self, opcode: int, destination: int, immediate: int) -> bool:
        assert not opcode & 0x08
        mask = MASK32 if opcode & 0x07 == 0x06 else MASK64
        left, right = self.registers[destination] & mask, immediate & mask
        return {0x10: left == right, 0x50: left != right, 0xA0: left < right}[opcode & 0xF0]

    def _load(self, address: int, size: int, call: Call) -> int:
        if CONTEXT <= address < CONTEXT + 24:
            assert size == 8
            length = len(call.address) if call.length is None else call.length
            # An int argument: what is above its 32 bits is nobody's promise.
            return {0: 0x5EED, 8: ADDRESS, 16: 0xDEADBEEF << 32 | length}[address - CONTEXT]
        data = bytes(self.stack[address + index] for index in range(size))
        return int.from_bytes(data, "little")

    def _call(self, helper: int, call: Call) -> None:
        if helper == 113:
            target, size, source = (self.registers[register] for register in (1, 2, 3))
            assert source == ADDRESS
            assert STACK <= target <= STACK + STACK_BYTES - size
            # Beyond what the caller gave is the kernel's old stack.
            assert size <= (len(call.address) if call.length is None else call.length), "reads beyond the address"
            self.stack |= {target + index: byte for index, byte in enumerate(call.address[:size])}
            result = 0
        elif helper == 15:
            result = 4242 << 32 | call.uid
        else:
            raise AssertionError(f"helper {helper}")
        self.registers = {0: result, **{key: value for key, value in self.registers.items() if key >= 6}}
