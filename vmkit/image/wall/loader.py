"""A program for the guest that is a list of system calls: a static ELF file of one page of code and one of data.

The guest has no compiler, no libbpf and, in a lean image, no ctypes; CPython's ctypes would cost a boot twenty times
what this does (docs/explanation/decisions.md). The code is the same for every list: it makes one call after another,
puts results where later calls have a use for them, and on the first failure writes that step's label and the errno, as
one byte, to its standard output, and ends with status 1. Linux on x86-64, the one architecture that images are built
for. Pure.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_PAGE_BYTES = 4096
_CODE_AT, _DATA_AT = 0x400000, 0x600000
# elf.h: Elf64_Ehdr, Elf64_Phdr; ET_EXEC, EM_X86_64, PT_LOAD, PT_GNU_STACK; PF_X 1, PF_W 2, PF_R 4.
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_ET_EXEC, _EM_X86_64, _PT_LOAD, _PT_GNU_STACK = 2, 62, 1, 0x6474E551
# One step: number, six arguments, where the result goes (0: nowhere), the label's address and length.
_STEP = struct.Struct("<q6QQQQ")
_ARGUMENTS = 6
_COMPARE = -1
_ESTALE = 116
# arch/x86/entry/syscalls/syscall_64.tbl.
_EXIT_GROUP = 231
# Also the ceiling of data: the second page is all there is.
_DATA_BYTES = 16 * _PAGE_BYTES

_CODE = bytes.fromhex(
    "bb00006000"  # mov ebx, 0x600000: the first step
    # next:
    "488b03"  # mov rax, [rbx]: the call's number
    "488b7b08"  # mov rdi, [rbx+8]: its arguments
    "488b7310"  # mov rsi, [rbx+16]
    "488b5318"  # mov rdx, [rbx+24]
    "4c8b5320"  # mov r10, [rbx+32]
    "4c8b4328"  # mov r8, [rbx+40]
    "4c8b4b30"  # mov r9, [rbx+48]
    "4885c0"  # test rax, rax
    "7804"  # js compare: no number
    "0f05"  # syscall
    "eb10"  # jmp done
    # compare: rdx bytes at rdi and rsi
    "4889d1"  # mov rcx, rdx
    "31c0"  # xor eax, eax: also sets ZF, should there be nothing to compare
    "f3a6"  # repe cmpsb
    "7407"  # je done
    "48c7c08cffffff"  # mov rax, -116: ESTALE
    # done:
    "4885c0"  # test rax, rax
    "780e"  # js fail
    "488b4b38"  # mov rcx, [rbx+56]: where the result goes
    "e302"  # jrcxz skip
    "8901"  # mov [rcx], eax
    # skip:
    "4883c350"  # add rbx, 80: the next step
    "ebb9"  # jmp next
    # fail:
    "f7d8"  # neg eax: the errno
    "488b7340"  # mov rsi, [rbx+64]: the label, which has room for one more byte
    "488b5348"  # mov rdx, [rbx+72]: its length
    "880416"  # mov [rsi+rdx], al
    "48ffc2"  # inc rdx
    "bf01000000"  # mov edi, 1: standard output
    "b801000000"  # mov eax, 1: write
    "0f05"  # syscall
    "bf01000000"  # mov edi, 1: the status
    "b8e7000000"  # mov eax, 231: exit_group
    "0f05"  # syscall
)


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of the loader's data: an argument that is one stands for their address."""

    index: int
    offset: int = 0

    def at(self, offset: int) -> "Place":
        """A place in the middle of them."""
        return Place(self.index, self.offset + offset)


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    arguments: tuple[int | Place, ...]
    label: str
    result_to: Place | None = None


class Loader:
    """Collects steps and their data, then renders them. Each step has a label, which is printed when it fails."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._data: list[tuple[bytes, tuple[tuple[int, Place], ...]]] = []

    def data(self, data: bytes, pointers: Sequence[tuple[int, Place]] = ()) -> Place:
        """Bytes that steps can point to and the kernel may write to. pointers: (offset, place) of addresses in them."""
        self._data.append((data, tuple(pointers)))
        return Place(len(self._data) - 1)

    def text(self, text: str) -> Place:
        """A string of C's."""
        return self.data(text.encode() + b"\0")

    def call(self, label: str, number: int, *arguments: int | Place, result_to: Place | None = None) -> None:
        """One system call; its result goes to 32 bits of data, if anywhere."""
        self._steps.append(_Step(number, arguments, label, result_to))

    def compare(self, label: str, one: Place, other: Place, size_bytes: int) -> None:
        """Fails with ESTALE when the bytes differ."""
        self._steps.append(_Step(_COMPARE, (one, other, size_bytes), label))

    def render(self) -> bytes:
        """The ELF file."""
        steps = [*self._steps, _Step(_EXIT_GROUP, (0,), "")]
        labels = [step.label.encode() for step in steps]
        blobs = [*(data for data, _ in self._data), *(label + b"\0" for label in labels)]
        addresses = _lay_out(blobs, _DATA_AT + len(steps) * _STEP.size)
        table = b"".join(
            self._pack_step(step, addresses, addresses[len(self._data) + index], len(labels[index]))
            for index, step in enumerate(steps)
        )
        body = bytearray(table)
        for index, blob in enumerate(blobs):
            body += bytes(addresses[index] - _DATA_AT - len(body)) + blob
        for index, (_, pointers) in enumerate(self._data):
            for offset, place in pointers:
                at = addresses[index] + offset - _DATA_AT
                struct.pack_into("<Q", body, at, addresses[place.index] + place.offset)
        assert len(body) <= _DATA_BYTES
        return _render_elf(bytes(body))

    def _pack_step(self, step: _Step, addresses: list[int], label_at: int, label_bytes: int) -> bytes:
        def address(place: int | Place) -> int:
            return addresses[place.index] + place.offset if isinstance(place, Place) else place

        arguments = [address(argument) for argument in step.arguments]
        arguments += [0] * (_ARGUMENTS - len(arguments))
        result_at = 0 if step.result_to is None else address(step.result_to)
        return _STEP.pack(step.number, *arguments, result_at, label_at, label_bytes)


def _lay_out(blobs: Sequence[bytes], start: int) -> list[int]:
    """The address of each, on a multiple of 8: the kernel reads structures there."""
    addresses = []
    for blob in blobs:
        addresses.append(start)
        start += len(blob) + -len(blob) % 8
    return addresses


def _render_elf(data: bytes) -> bytes:
    code_offset = _EHDR.size + 3 * _PHDR.size
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    code_bytes = code_offset + len(_CODE)
    header = _EHDR.pack(
        ident, _ET_EXEC, _EM_X86_64, 1, _CODE_AT + code_offset, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, 3, 0, 0, 0
    )
    header += _PHDR.pack(_PT_LOAD, 5, 0, _CODE_AT, _CODE_AT, code_bytes, code_bytes, _PAGE_BYTES)
    header += _PHDR.pack(_PT_LOAD, 6, _PAGE_BYTES, _DATA_AT, _DATA_AT, len(data), len(data), _PAGE_BYTES)
    header += _PHDR.pack(_PT_GNU_STACK, 6, 0, 0, 0, 0, 0, 16)
    page = header + _CODE
    return page + bytes(_PAGE_BYTES - len(page)) + data
