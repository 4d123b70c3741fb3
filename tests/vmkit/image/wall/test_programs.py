"""The wall's BPF programs: their bytes, an independent reading of them, their verdicts on addresses of all sorts."""

import struct

import pytest

from tests.vmkit.image.wall.bpf_machine import BpfMachine, Call
from vmkit.image.wall.bpf import R0, R1, Label, as_signed32, assemble, jump_if_equal32, leave, set_value
from vmkit.image.wall.programs import make_bind_program, make_connect_program

AF_UNSPEC, AF_UNIX, AF_INET, AF_VSOCK = 0, 1, 2, 40
ANY = 0xFFFFFFFF
EPERM = -1


def address(cid: int, port: int = 9001, *, family: int = AF_VSOCK, flags: int = 0) -> bytes:
    """struct sockaddr_vm of linux/vm_sockets.h."""
    return struct.pack("<HHIIB3x", family, 0, port, cid, flags)


# Written down once by hand from the specification; a changed byte is a changed program.
GOLDEN_CONNECT = """
79 12 10 00 00 00 00 00  a6 02 0d 00 10 00 00 00  79 13 08 00 00 00 00 00  bf a1 00 00 00 00 00 00
07 01 00 00 f0 ff ff ff  b7 02 00 00 10 00 00 00  85 00 00 00 71 00 00 00  56 00 05 00 00 00 00 00
69 a1 f0 ff 00 00 00 00  56 01 05 00 28 00 00 00  61 a1 f8 ff 00 00 00 00  16 01 03 00 02 00 00 00
16 01 02 00 00 00 00 f0  b7 00 00 00 ff ff ff ff  95 00 00 00 00 00 00 00  b7 00 00 00 00 00 00 00
95 00 00 00 00 00 00 00
"""


def test_connect_program_is_these_bytes() -> None:
    assert make_connect_program((0xF0000000,)) == bytes.fromhex(GOLDEN_CONNECT)


def test_bind_program_is_as_long_as_it_reads() -> None:
    words = struct.iter_unpack("<BBhi", make_bind_program(9001))
    assert [opcode for opcode, *_ in words] == [
        0x79, 0xA6, 0x79, 0xBF, 0x07, 0xB7, 0x85, 0x56, 0x69, 0x56, 0x61, 0x56, 0x85, 0x16, 0xB7, 0x95, 0xB7, 0x95,
    ]  # fmt: skip


@pytest.mark.parametrize("uid", [0, 1000, ANY])
@pytest.mark.parametrize(
    ("call", "verdict"),
    [
        *(
            (address(cid), 0 if cid == 2 else EPERM)
            for cid in (0, 1, 2, 3, 4, 1000, 0x7FFFFFFF, 0x80000000, ANY - 1, ANY)
        ),
        *((address(cid, port), EPERM) for cid in (1, 3) for port in (0, 1, 1023, 9001, ANY)),
        (address(2, flags=1), 0),
        (address(3, flags=1), EPERM),
        (address(1) + bytes(112), EPERM),
        (address(1)[:15], 0),
        (address(1)[:2], 0),
        (b"", 0),
        (address(1, family=AF_UNSPEC), 0),
        (address(1, family=AF_UNIX), 0),
        (address(1, family=AF_INET), 0),
        (address(1, family=AF_VSOCK << 8), 0),
    ],
)
def test_connect_verdicts(call: bytes, verdict: int, uid: int) -> None:
    assert BpfMachine(make_connect_program(())).run(Call(call, uid=uid)) == verdict


@pytest.mark.parametrize("more", [(7,), (3, 4, 0xFFFFFFFE), tuple(range(3, 67))])
def test_connect_allows_the_cids_of_the_recipe_and_no_others(more: tuple[int, ...]) -> None:
    machine = BpfMachine(make_connect_program(more))
    for cid in (0, 1, 2, 3, 4, 6, 7, 8, 66, 67, 0x7FFFFFFE, 0xFFFFFFFE, ANY):
        assert machine.run(Call(address(cid))) == (0 if cid == 2 or cid in more else EPERM)


@pytest.mark.parametrize(
    ("call", "verdict"),
    [
        (Call(address(ANY, 9001), uid=0), 0),
        (Call(address(ANY, 9001), uid=1000), EPERM),
        (Call(address(3, 9001), uid=1000), EPERM),
        (Call(address(1, 9001), uid=65534), EPERM),
        (Call(address(ANY, 9001), uid=ANY), EPERM),
        (Call(address(ANY, 9002), uid=1000), 0),
        (Call(address(ANY, ANY), uid=1000), 0),
        (Call(address(ANY, 9001, family=AF_INET), uid=1000), 0),
        (Call(address(ANY, 9001)[:15], uid=1000), 0),
        (Call(address(ANY, 9001), length=128, uid=1000), EPERM),
    ],
)
def test_bind_verdicts(call: Call, verdict: int) -> None:
    assert BpfMachine(make_bind_program(9001)).run(call) == verdict


def test_assembler_counts_jumps_from_the_next_instruction() -> None:
    program = assemble([jump_if_equal32(R1, 0xFFFFFFFF, "end"), set_value(R0, 5), Label("end"), leave()])
    assert program == bytes.fromhex("16010100ffffffff b700000005000000 9500000000000000")


@pytest.mark.parametrize(("value", "signed"), [(0, 0), (0x7FFFFFFF, 0x7FFFFFFF), (1 << 31, -(1 << 31)), (ANY, -1)])
def test_immediates_have_a_sign(value: int, signed: int) -> None:
    assert as_signed32(value) == signed
