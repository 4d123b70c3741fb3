"""Opens the files that a matrix is made of: kernels, disks, locks, and results that other hosts have written.

One of them may be a FIFO. Its open would wait for a writer that never comes.
"""

import errno
import io
import os
import stat
from pathlib import Path


def open_file(path: Path) -> io.BufferedReader:
    """Opens a regular file or a disk for reading, and waits for nothing. Raises OSError, for another kind too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
