"""How the process that serves a share ends."""

import contextlib
import socket
import threading

from vmkit.shares.connection import await_unmount


def test_share_ends_after_its_guest_has_let_go_of_the_place() -> None:
    """The next share at the same place came too early, and the guest took its folder away."""
    ours, theirs = socket.socketpair()
    is_unmounted = threading.Event()

    def unmount() -> None:
        # Requests of programs that use the folder still; then the host's end is seen.
        theirs.sendall(b"request")
        while theirs.recv(1):
            pass
        is_unmounted.set()
        theirs.close()

    guest = threading.Thread(target=unmount)
    guest.start()
    with ours:
        await_unmount(ours.fileno())
        assert is_unmounted.is_set()
    guest.join()


def test_share_of_a_guest_that_is_gone_ends_at_once() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        await_unmount(ours.fileno())


def test_guest_that_sends_without_end_does_not_hold_up_the_end() -> None:
    ours, theirs = socket.socketpair()

    def flood() -> None:
        with contextlib.suppress(OSError):
            while True:
                theirs.sendall(bytes(1 << 16))

    guest = threading.Thread(target=flood)
    guest.start()
    with ours:
        await_unmount(ours.fileno())
    guest.join()
    theirs.close()
