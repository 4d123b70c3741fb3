"""Claiming a CID at a fake door to /dev/vhost-vsock: what the kernel refuses is told so that one can act."""

import errno
import os

import pytest

from vmkit.errors import HostError, MachineError
from vmkit.machine.vhost import VHOST_VSOCK_SET_GUEST_CID, VhostClaim, claim_cid


class Door:
    """A door that opens, or does not, and takes CIDs, or does not."""

    def __init__(self, open_error: int = 0, cid_error: int = 0) -> None:
        self.open_error = open_error
        self.cid_error = cid_error
        self.fds: list[int] = []
        self.claimed: list[int] = []

    def open_device(self) -> int:
        if self.open_error:
            raise OSError(self.open_error, os.strerror(self.open_error))
        self.fds.append(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        return self.fds[-1]

    def set_guest_cid(self, fd: int, cid: int) -> None:
        if self.cid_error:
            raise OSError(self.cid_error, os.strerror(self.cid_error))
        self.claimed.append(cid)


def test_claimed_cid_comes_with_the_descriptor_that_owns_it() -> None:
    door = Door()
    fd = claim_cid(door, 42)
    assert door.claimed == [42]
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOENT, "No such file or directory"), (errno.EACCES, "Permission denied")]
)
def test_device_that_cannot_be_opened_is_told_with_the_way_out(number: int, said: str) -> None:
    with pytest.raises(HostError, match=f"cannot open /dev/vhost-vsock: {said}") as caught:
        claim_cid(Door(open_error=number), 3)
    assert "modprobe vhost_vsock" in caught.value.hint
    assert "--backend user" in caught.value.hint


def test_taken_cid_is_a_clear_error_and_no_descriptor_leaks() -> None:
    door = Door(cid_error=errno.EADDRINUSE)
    with pytest.raises(MachineError, match="CID 9 is in use on this host"):
        claim_cid(door, 9)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(door.fds[0])


def test_other_refusal_of_a_cid_says_the_kernels_word() -> None:
    with pytest.raises(HostError, match="refuses CID 9: Invalid argument"):
        claim_cid(Door(cid_error=errno.EINVAL), 9)


def test_claim_is_closed_once() -> None:
    claim = VhostClaim(Door())
    claim.close()
    claim.take(5)
    claim.close()
    claim.close()
    assert claim.fd is None


def test_ioctl_number_is_the_headers() -> None:
    """_IOW(0xAF, 0x60, __u64): direction 1 << 30, size 8 << 16, type 0xAF << 8, number 0x60."""
    assert VHOST_VSOCK_SET_GUEST_CID == 1 << 30 | 8 << 16 | 0xAF << 8 | 0x60
