"""The host's side of vsock_guest_exec: listens for a guest, sends it commands, and waits until it has run them.

The guest connects (`vshd --exec-from`), so this works before vshd serves, and before init. The protocol is in
vshd.wire.commands.
"""

import errno
import select
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress

from vsh.address import HYBRID, VSOCK, Address
from vsh.errors import UsageError, VshError
from vsh.listener import HostListener, listen_for_guest
from vsh.registry import Entry
from vshd.wire.commands import BadCommandError, encode_command

CHUNK_BYTES = 1 << 16


def encode(command: bytes, *, is_persistent: bool) -> bytes:
    """What travels for a command. Raises UsageError for one that no guest takes."""
    try:
        return encode_command(command, is_persistent=is_persistent)
    except BadCommandError as error:
        raise UsageError(f"the guest cannot take this command: {error}") from error


def find_address(machine: Entry) -> Address:
    """The address of a machine in any state: its guest connects, so vshd need not be ready."""
    kind = VSOCK if machine.vsock is None else HYBRID
    return Address(kind, name=f"machine '{machine.name}'", path=machine.vsock or "", cid=machine.cid)


def send_commands(
    vm: Address, port: int, messages: Iterable[bytes], *, timeout_s: float, write: Callable[[bytes], None]
) -> None:
    """Waits for a connection of the guest, sends it messages, and waits until the guest has closed it.

    timeout_s: how long the guest may take to connect. write: gets what the guest sends. Raises VshError.
    """
    with closing(listen_for_guest(vm, port)) as listener:
        connection = _accept(listener, port, timeout_s)
    with connection:
        try:
            for message in messages:
                _send(connection, message, write)
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(CHUNK_BYTES):
                write(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise VshError("the guest closed the connection before it had taken all commands") from error
        except OSError as error:
            # shutdown() of a connection that the guest has closed.
            if error.errno != errno.ENOTCONN:
                raise


def _accept(listener: HostListener, port: int, timeout_s: float) -> socket.socket:
    deadline_s = time.monotonic() + timeout_s
    listener.socket.setblocking(False)
    poll = select.poll()
    poll.register(listener.socket.fileno(), select.POLLIN)
    # Another guest's connection, which is closed.
    refused = ""
    while (left_s := deadline_s - time.monotonic()) > 0:
        poll.poll(left_s * 1000)
        try:
            connection = socket.socket(fileno=listener.accept())
        except BlockingIOError:
            continue
        except VshError as error:
            refused = error.brief
            continue
        connection.setblocking(True)
        return connection
    raise VshError(
        f"no program of the guest connected to port {port} within {timeout_s:g} s",
        details=refused,
        hint=f"start one in the guest: vshd --exec-from :{port}",
    )


def _send(connection: socket.socket, message: bytes, write: Callable[[bytes], None]) -> None:
    """Sends a message. Takes what the guest sends meanwhile: one that waits for us to read would not read either."""
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLOUT)
    while message:
        events = poll.poll()[0][1]
        if events & select.POLLIN:
            data = connection.recv(CHUNK_BYTES)
            if not data:
                raise BrokenPipeError
            write(data)
        if events & ~select.POLLIN:
            with suppress(BlockingIOError):
                message = message[connection.send(message, socket.MSG_DONTWAIT) :]
