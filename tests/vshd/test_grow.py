"""The root that grows with its disk: tests/guest/test_stored.py has one that does. Here is one that cannot."""

import errno
from pathlib import Path

import pytest

from vshd.pid1.grow import EXT4_IOC_RESIZE_FS, grow, main


def test_file_system_that_cannot_grow_is_used_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    # /proc is no ext4, whatever this host's own file systems are.
    with pytest.raises(OSError, match="Inappropriate ioctl") as caught:
        grow(str(tmp_path / "disk"), "/proc")
    assert caught.value.errno == errno.ENOTTY
    main([str(tmp_path / "disk"), "/proc"])
    assert capfd.readouterr().err == (
        "vmkit-init: warning: the root stays as small as it was: Inappropriate ioctl for device\n"
    )


def test_ioctl_has_the_number_of_the_kernels_header() -> None:
    """_IOW('f', 16, __u64): direction, size, type, number (asm-generic/ioctl.h)."""
    assert 1 << 30 | 8 << 16 | ord("f") << 8 | 16 == EXT4_IOC_RESIZE_FS
