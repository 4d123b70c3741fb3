"""A mount by virtiofs, as far as no device is needed: when it ends, and what a kernel without virtiofs answers."""

import os
import signal
import socket
from pathlib import Path

import pytest

from vshd.services import share_virtiofs
from vshd.services.share_virtiofs import VirtiofsWay, prepare
from vshd.session.refusal import RefusalError
from vshd.signals import Wakeup
from vshd.wire import messages


@pytest.fixture
def wakeup() -> Wakeup:
    return Wakeup((signal.SIGTERM,))


def test_share_ends_with_the_connection(wakeup: Wakeup) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        # What comes means nothing.
        ours.sendall(b"x")
        ours.close()
        assert VirtiofsWay().serve(theirs.fileno(), b"", wakeup) == "closed"


def test_share_ends_with_the_mount(wakeup: Wakeup) -> None:
    ours, theirs = socket.socketpair()
    way = VirtiofsWay()
    # No list of mounts has it.
    way._mount = b"4294967295"
    with ours, theirs:
        assert way.serve(theirs.fileno(), b"", wakeup) == "unmounted"


def test_share_ends_with_vshd(wakeup: Wakeup) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.kill(os.getpid(), signal.SIGTERM)
        assert VirtiofsWay().serve(theirs.fileno(), b"", wakeup) == "vshd is shutting down"


def test_kernel_without_virtiofs_is_a_refusal_that_lets_the_host_try_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share_virtiofs, "_has_type", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RefusalError, match="this guest's kernel has no virtiofs") as refused:
        prepare()
    assert refused.value.failure.kind == messages.UNSUPPORTED
