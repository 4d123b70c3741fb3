"""The two programs of the wall's kernel layer: who may connect to which CID, and who may bind vshd's port.

Both run at a hook of the kernel's security modules (linux/lsm_hook_defs.h: socket_connect, socket_bind) with the
arguments (socket, address, length of the address), and answer 0 or -EPERM. Every way to connect or bind comes by there,
io_uring's too. The address is the kernel's own copy, made before the hook is asked and used afterwards: no other thread
of the caller's can change it between the two. Pure.

An address shorter than struct sockaddr_vm passes unread, for behind its end is old content of the kernel's stack:
af_vsock itself refuses it (vsock_addr_cast), as it does an address of another family.
"""

from vmkit.image.wall.bpf import (
    R0,
    R1,
    R2,
    R3,
    R10,
    Instruction,
    Label,
    add,
    assemble,
    call,
    copy,
    jump_if_equal32,
    jump_if_less32,
    jump_if_not_equal32,
    leave,
    load16,
    load32,
    load64,
    set_value,
)
from vmkit.image.wall.spec import CID_HOST

# linux/bpf.h: BPF_FUNC_get_current_uid_gid, BPF_FUNC_probe_read_kernel.
_GET_CURRENT_UID_GID, _PROBE_READ_KERNEL = 15, 113
# linux/vm_sockets.h: struct sockaddr_vm has its family (u16) at 0, the port (u32) at 4, the CID (u32) at 8.
_AF_VSOCK = 40
_SOCKADDR_VM_BYTES = 16
_FAMILY_AT, _PORT_AT, _CID_AT = (offset - _SOCKADDR_VM_BYTES for offset in (0, 4, 8))
_EPERM = 1
# The hook's arguments, 64 bits each.
_ADDRESS_ARGUMENT, _LENGTH_ARGUMENT = 8, 16

_Program = list[Instruction | Label]


def make_connect_program(cids: tuple[int, ...]) -> bytes:
    """Refuses to connect an AF_VSOCK socket to any CID but the host's and these, for root too."""
    return assemble(
        [
            *_read_address(),
            load32(R1, R10, _CID_AT),
            *(jump_if_equal32(R1, cid, "allow") for cid in (CID_HOST, *cids)),
            *_end(),
        ]
    )


def make_bind_program(port: int) -> bytes:
    """Refuses to bind an AF_VSOCK socket to this port, except to the real user 0 of the initial user namespace.

    The kernel picks a port for VMADDR_PORT_ANY. The program does not check it: vshd holds its port by then, and the
    kernel passes over a port that is taken.
    """
    return assemble(
        [
            *_read_address(),
            load32(R1, R10, _PORT_AT),
            jump_if_not_equal32(R1, port, "allow"),
            call(_GET_CURRENT_UID_GID),
            # The uid is the lower half; a root of another user namespace is here who made it.
            jump_if_equal32(R0, 0, "allow"),
            *_end(),
        ]
    )


def _read_address() -> _Program:
    """Copies an AF_VSOCK address to the 16 bytes under R10; any other call passes."""
    return [
        # An int among the arguments: its upper half is not defined.
        load64(R2, R1, _LENGTH_ARGUMENT),
        jump_if_less32(R2, _SOCKADDR_VM_BYTES, "allow"),
        load64(R3, R1, _ADDRESS_ARGUMENT),
        copy(R1, R10),
        add(R1, -_SOCKADDR_VM_BYTES),
        set_value(R2, _SOCKADDR_VM_BYTES),
        call(_PROBE_READ_KERNEL),
        jump_if_not_equal32(R0, 0, "refuse"),
        load16(R1, R10, _FAMILY_AT),
        jump_if_not_equal32(R1, _AF_VSOCK, "allow"),
    ]


def _end() -> _Program:
    return [Label("refuse"), set_value(R0, -_EPERM), leave(), Label("allow"), set_value(R0, 0), leave()]
