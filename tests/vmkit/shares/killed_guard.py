"""Kills guards at each point of a device's start: `python -m tests.vmkit.shares.killed_guard STEP`.

The points are the calls of built-in functions, which all system calls are: before each and after each. STEP: 1 for all
of them. It prints how many there are. This program forks, and so it has one thread.
"""

import fcntl
import os
import signal
import socket
import sys
import termios

from tests.vmkit.shares.device_driver import FsDriver, make_request
from tests.vmkit.shares.guarded import READ, expect_error
from tests.vsh.live import wait_until
from vmkit.shares.deputy import stand_by
from vmkit.shares.notes import PID, Deputy, Note
from vmkit.shares.relay import DeviceRelay, wait_for
from vmkit.vsock import vhost_user as vu

FEATURES = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32
ANSWERS = {vu.GET_FEATURES: FEATURES, vu.GET_PROTOCOL_FEATURES: 9, vu.GET_QUEUE_NUM: 2}
# Messages of QEMU's that come in parts. What is left of the second looks like a header, and another message follows.
_NUM = vu.HEADER.pack(vu.SET_VRING_NUM, 1, 8) + bytes(8)
_ADDRESS = vu.HEADER.pack(vu.SET_VRING_ADDR, 1, 40) + bytes(36) + vu.render_u64(8)[:4]
SPLIT = _NUM[:5], _NUM[5:13], _NUM[13:], _ADDRESS[:-12], _ADDRESS[-12:] + _NUM


def count_unread(sock: socket.socket) -> int:
    """The bytes that the other end has not read."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def kill_guard_at(count: int) -> bool:
    """A device's start with a guard that is killed at this call; False where there are not so many."""
    qemu, guards = socket.socketpair()
    reached, reaching = os.pipe()
    booted, booting = os.pipe()
    deputy = os.fork()
    if deputy == 0:
        status = 9
        try:
            for fd in (qemu.detach(), reached, booting):
                os.close(fd)
            status = run_deputy(guards, count, reaching, booted)
        finally:
            os._exit(status)
    guards.close()
    os.close(reaching)
    os.close(booted)
    driver = FsDriver(qemu)
    try:
        for number, part in enumerate(SPLIT):
            qemu.sendall(part)
            wait_until(lambda: count_unread(qemu) == 0, f"nobody reads part {number}")
        driver.boot()
        head = driver.submit(make_request(READ, 1), room=4096)
        # Here it is killed at the latest.
        os.close(booting)
        expect_error(driver.wait(head), 1)
        expect_error(driver.ask(make_request(READ, 2)), 2)
        assert driver.stop() == [0, 2]
        assert driver.front.ask_u64(vu.GET_FEATURES) == FEATURES
    except AssertionError as error:
        raise AssertionError(f"killed at call {count}") from error
    finally:
        driver.close()
        status = os.waitpid(deputy, 0)[1]
        is_reached = bool(os.read(reached, 1))
        os.close(reached)
    assert status == 0, count
    return is_reached


def run_deputy(guards: socket.socket, count: int, reaching: int, booted: int) -> int:
    """As vmkit.shares.guard does."""
    pidfd = os.pidfd_open(os.getpid())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    replies = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    connection, servers = socket.socketpair()
    server = os.fork()
    if server == 0:
        for sock in (connection, guards, ours, theirs):
            sock.close()
        os.setsid()
        serve(servers)
        os._exit(0)
    servers.close()
    guard = os.fork()
    if guard == 0:
        theirs.close()
        note = Deputy(ours, pidfd, replies)
        note.note(Note.SERVER, PID.pack(server))
        # Of a guard that is killed before QEMU has asked for these, QEMU takes no device.
        for request, number in ANSWERS.items():
            note.note(Note.ANSWER, vu.render_reply(request, vu.render_u64(number)))
        run_guard(DeviceRelay(connection, note), guards, count, reaching, booted)
        os._exit(0)
    for one in (connection, guards, ours):
        one.close()
    for fd in (replies[1], reaching):
        os.close(fd)
    return stand_by(guard, theirs, replies[0], "/nonexistent/qemu")


def run_guard(relay: DeviceRelay, guards: socket.socket, count: int, reaching: int, booted: int) -> None:
    left = count

    def look(_frame: object, event: str, _argument: object) -> None:
        nonlocal left
        left -= event in ("c_call", "c_return")
        if left <= 0:
            os.write(reaching, b"!")
            os.kill(os.getpid(), signal.SIGKILL)

    relay.greet()
    relay.connect(guards)
    sys.setprofile(look)
    while booted not in wait_for([*relay.list_waits(), booted], None):
        relay.work()
    sys.setprofile(None)
    os.kill(os.getpid(), signal.SIGKILL)


def serve(connection: socket.socket) -> None:
    """A virtiofsd that answers QEMU's messages and no request."""
    decoder = vu.Decoder()
    while True:
        try:
            message = vu.receive_message(connection, decoder)
        except (EOFError, vu.VhostUserError):
            return
        assert message is not None
        if message.request in ANSWERS or message.needs_reply:
            answer = vu.render_u64(ANSWERS.get(message.request, 0))
            connection.sendall(vu.render_reply(message.request, answer))
        message.close()


if __name__ == "__main__":
    count = 1
    while kill_guard_at(count):
        count += int(sys.argv[1])
    print(count)
