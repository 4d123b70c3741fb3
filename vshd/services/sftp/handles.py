"""The open files and folders of one connection, by the numbers that its client knows."""

import os

from vshd.services.sftp.packets import FAILURE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# Each is a descriptor of this process, which most systems limit to 1024.
HANDLES_MAX = 512
NUMBER_MAX = (1 << 32) - 1


class StatusError(Exception):
    """A request has failed with this status."""

    def __init__(self, code: int, text: bytes) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Folder:
    """A folder that is being listed: the entries that were not sent yet. Nothing of it is kept in memory."""

    __slots__ = ("_has_dots", "_scan", "entries", "path")

    def __init__(self, path: bytes) -> None:
        """Raises OSError."""
        self.path = path
        self._scan = os.scandir(path)
        self.entries: Iterator[os.DirEntry[bytes]] = self._scan
        # "." and "..", which scandir leaves out and clients of OpenSSH's server see.
        self._has_dots = False

    def take_dots(self) -> bool:
        """Whether "." and ".." are still to be sent; from now on they are not."""
        is_due, self._has_dots = not self._has_dots, True
        return is_due

    def close(self) -> None:
        self._scan.close()


class File:
    """An open file. is_regular: its size is known, and its pages can be spliced."""

    __slots__ = ("fd", "is_regular")

    def __init__(self, fd: int, *, is_regular: bool) -> None:
        self.fd = fd
        self.is_regular = is_regular

    def close(self) -> None:
        """Raises OSError: what was written may not have reached the disk."""
        os.close(self.fd)


class Handles:
    """Invariant: every open file or folder of the connection has one number, which no later one gets soon."""

    __slots__ = ("_folders", "_last", "files")

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self._folders: dict[int, Folder] = {}
        self._last = -1

    def check_room(self) -> None:
        """Raises StatusError."""
        if len(self.files) + len(self._folders) >= HANDLES_MAX:
            raise StatusError(FAILURE, b"this connection has %d open files, and may have no more" % HANDLES_MAX)

    def add_file(self, file: File) -> int:
        self.files[number := self._find_number()] = file
        return number

    def add_folder(self, folder: Folder) -> int:
        self._folders[number := self._find_number()] = folder
        return number

    def file(self, number: int) -> File:
        """Raises StatusError."""
        file = self.files.get(number)
        if file is None:
            raise _unknown()
        return file

    def folder(self, number: int) -> Folder:
        """Raises StatusError."""
        folder = self._folders.get(number)
        if folder is None:
            raise _unknown()
        return folder

    def close(self, number: int) -> None:
        """Raises StatusError, OSError; the handle is gone."""
        handle: File | Folder | None = self.files.pop(number, None)
        if handle is None:
            handle = self._folders.pop(number, None)
        if handle is None:
            raise _unknown()
        handle.close()

    def close_all(self) -> None:
        handles: list[File | Folder] = [*self.files.values(), *self._folders.values()]
        for handle in handles:
            try:
                handle.close()
            except OSError:
                pass
        self.files.clear()
        self._folders.clear()

    def _find_number(self) -> int:
        number = self._last
        while True:
            number = number + 1 if number < NUMBER_MAX else 0
            if number not in self.files and number not in self._folders:
                self._last = number
                return number


def _unknown() -> StatusError:
    return StatusError(FAILURE, b"no open file has this handle")
