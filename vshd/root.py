"""The root that sessions see, where it is not vshd's own: the `/` of another mount namespace (mount_namespaces(7)).

vshd, its Python and its libraries stay outside, in the root that vshd was started in. A session's process enters the
namespace before it looks up its user, so that users, shells, programs, terminals and files are the root's. Never
chroot(2): a process leaves that by a few calls, and nothing below it can have a user namespace of its own.
"""

import _socket
import errno
import fcntl
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# linux/sched.h
CLONE_NEWNS = 0x00020000
# linux/nsfs.h
NS_GET_NSTYPE = 0xB703
OWN = "/proc/self/ns/mnt"
# What any session may load later. Python would look for it in the root that was entered.
LATER = ("fcntl", "resource")


class Root:
    """Both namespaces. Invariant: while this process is inside, Python finds no module that it has not loaded: none of
    the root's files becomes code of vshd.
    """

    __slots__ = ("_inside", "_outside", "_path", "_set")

    def __init__(self, inside: int, outside: int) -> None:
        """Descriptors of the root's namespace and of our own, which are the object's from here on."""
        self._inside = inside
        self._outside = outside
        self._path: list[str] | None = None
        self._set = find_call("setns")

    def enter(self, later: tuple[str, ...] = ()) -> None:
        """This process has the root as `/`, and as its working directory. later: modules that are loaded before.

        Raises OSError.
        """
        if self._path is not None:
            return
        load(later)
        self._set(self._inside, CLONE_NEWNS)
        self._path, sys.path = sys.path, []

    def leave(self) -> None:
        """The root is vshd's own again. Raises OSError, and for a process that is not root any more, too."""
        if self._path is None:
            return
        self._set(self._outside, CLONE_NEWNS)
        sys.path, self._path = self._path, None


def open_root(path: str) -> Root | None:
    """The root of `path`, a file that stands for a mount namespace such as /proc/PID/ns/mnt; None for an empty path.

    Raises OSError that says what is wrong.
    """
    if not path:
        return None
    load(LATER)
    _pin_names()
    return open_namespaces(path)


def open_namespaces(path: str) -> Root:
    """The root of `path`, for a process that has no sessions in it. Raises OSError that says what is wrong."""
    inside = -1
    try:
        inside = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if _find_type(inside) != CLONE_NEWNS:
            raise OSError(errno.EINVAL, "it is no mount namespace")
        return Root(inside, os.open(OWN, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if inside >= 0:
            os.close(inside)
        raise OSError(error.errno, f"cannot use --root_namespace={path}: {error.strerror}") from error


def load(modules: tuple[str, ...]) -> None:
    """Loads modules, as far as this Python has them: a minimal one has no `resource`."""
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            if module.startswith("vshd."):
                raise


def _pin_names() -> None:
    """Has the C library read where it looks for hosts. It does not read that again in another root (glibc 2.33), and so
    loads none of that root's libraries for it.
    """
    try:
        _socket.getaddrinfo(b"localhost", None)
    except OSError:
        pass


def _find_type(fd: int) -> int:
    try:
        return fcntl.ioctl(fd, NS_GET_NSTYPE)
    except OSError as error:
        raise OSError(errno.EINVAL, "it is no mount namespace") from error


def find_call(name: str) -> "Callable[..., None]":
    """setns(2) or unshare(2). Raises OSError where this Python has no way to call it."""
    call: Callable[..., None] | None = getattr(os, name, None)
    if call is not None:
        return call
    try:
        # Python 3.11 and before.
        import ctypes  # noqa: PLC0415
    except ImportError as error:
        raise OSError(errno.ENOSYS, f"this Python has neither os.{name} nor ctypes") from error
    function = getattr(ctypes.CDLL(None, use_errno=True), name)

    def call_library(*words: int) -> None:
        if function(*words):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    return call_library
