"""Starts the target: environment, directory, program, pipes or pty, and every signal as a fresh process expects it.

posix_spawn() does the rest: it is vfork-fast, resets signals, makes the new session, and says why when the program
cannot be executed. The directory and the user are those of the calling process, which serves this one session. Terminal
ioctls are numbers here because Debian's minimal Python has no termios.
"""

import errno
import fcntl
import os
import sys

from vshd.session.account import Account
from vshd.session.refusal import RefusalError
from vshd.signals import find_ignored
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

# Debian's login defaults (ENV_SUPATH, ENV_PATH of login.defs).
ROOT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER_PATH = b"/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"

# asm-generic/ioctls.h
TIOCSWINSZ = 0x5414
WINDOW_SIZE_MAX = 0xFFFF

SHELL_OF_SCRIPTS = b"/bin/sh"
ELF = b"\x7fELF"

# What posix_spawn() does with descriptors, in its own words.
Actions = list[tuple[object, ...]]


class Target:
    """A running target and our ends of its stdio. With a pty `stdin` and `stdout` are one descriptor, `stderr` is -1.

    `slave` is the terminal, held open so that the master never reports an end that is none; -1 with pipes.
    """

    __slots__ = ("pid", "slave", "stderr", "stdin", "stdout")

    def __init__(self, pid: int, stdin: int, stdout: int, stderr: int, slave: int = -1) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.slave = slave

    @property
    def has_pty(self) -> bool:
        return self.slave >= 0


def build_environment(request: SetupConnectionRequest, account: Account, *, inherit: bool) -> dict[bytes, bytes]:
    """The target's environment, in the order of docs/reference/protocol.md 1.4."""
    environment = dict(os.environb) if inherit else {}
    environment.update(request.env)
    environment.setdefault(b"PATH", ROOT_PATH if account.uid == 0 else USER_PATH)
    environment.setdefault(b"TERM", b"linux")
    environment.setdefault(b"USER", os.fsencode(account.name))
    environment.setdefault(b"LOGNAME", os.fsencode(account.name))
    for name, value in ((b"SHELL", account.shell), (b"HOME", account.home)):
        if not (request.keeps_env and name in request.env):
            environment[name] = os.fsencode(value)
    return environment


def enter_directory(request: SetupConnectionRequest, account: Account) -> None:
    """Home, else /; then what the request names. Raises RefusalError, from the directory reached so far."""
    try:
        os.chdir(account.home)
    except (OSError, ValueError):
        _enter(b"/")
    if request.cwd:
        _enter(request.cwd)
    if request.cwd_pid:
        if request.cwd_pid < 0:
            raise RefusalError(f"{request.cwd_pid} is no process", messages.BAD_REQUEST)
        _enter(b"/proc/%d/cwd" % request.cwd_pid)


def start_target(request: SetupConnectionRequest, account: Account, environment: dict[bytes, bytes]) -> Target:
    """Runs the request's program, or the login shell. Raises RefusalError; then nothing runs or stays open."""
    _check_words(request.argv, environment)
    if request.argv:
        name, argv = request.argv[0], request.argv
    else:
        name = os.fsencode(account.shell)
        argv = [b"-" + os.path.basename(name)]
    if request.nopty:
        return _start_with_pipes(name, argv, environment)
    return _start_with_pty(request, name, argv, environment)


def _check_words(argv: list[bytes], environment: dict[bytes, bytes]) -> None:
    """Raises RefusalError for what execve() has no way to say."""
    if any(b"\0" in word for word in argv):
        raise RefusalError("a word of the command holds a NUL byte", messages.BAD_REQUEST)
    for key, value in environment.items():
        if not key or b"=" in key or b"\0" in key or b"\0" in value:
            shown = os.fsdecode(key)
            raise RefusalError(f"the environment cannot hold a variable '{shown}'", messages.BAD_REQUEST, subject=key)


def resize_window(master: int, rows: int, cols: int, xpixels: int, ypixels: int) -> None:
    """The terminal's new size. Upstream's server takes any, 0 included, and keeps 16 bits of each."""
    size = b"".join((number & WINDOW_SIZE_MAX).to_bytes(2, sys.byteorder) for number in (rows, cols, xpixels, ypixels))
    try:
        fcntl.ioctl(master, TIOCSWINSZ, size)
    except OSError:
        pass


def _enter(path: bytes) -> None:
    try:
        os.chdir(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        code = (error.errno or 0) if isinstance(error, OSError) else 0
        shown = os.fsdecode(path)
        raise RefusalError(
            f"cannot change to directory {shown}: {reason}", messages.BAD_DIRECTORY, error=code, subject=path
        ) from error


def _start_with_pipes(name: bytes, argv: list[bytes], environment: dict[bytes, bytes]) -> Target:
    ends: list[int] = []
    try:
        for _ in range(3):
            ends += os.pipe()
        stdin, our_stdin, our_stdout, stdout, our_stderr, stderr = ends
        actions: Actions = [
            (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_DUP2, stdout, 1),
            (os.POSIX_SPAWN_DUP2, stderr, 2),
        ]
        pid = _spawn(name, argv, environment, actions)
    except OSError as error:
        _close_all(ends)
        raise RefusalError(f"could not make pipes: {error.strerror}", messages.LIMIT, error=error.errno or 0) from error
    except RefusalError:
        _close_all(ends)
        raise
    _close_all([stdin, stdout, stderr])
    for fd in (our_stdin, our_stdout, our_stderr):
        os.set_blocking(fd, False)
    return Target(pid, our_stdin, our_stdout, our_stderr)


def _start_with_pty(
    request: SetupConnectionRequest, name: bytes, argv: list[bytes], environment: dict[bytes, bytes]
) -> Target:
    try:
        master, slave = os.openpty()
        terminal = os.ttyname(slave)
    except OSError as error:
        raise RefusalError("could not allocate pty", messages.LIMIT, error=error.errno or 0) from error
    # Before the program starts: it may ask at once. A request without a size leaves the kernel's, which is 0.
    if 0 < request.window_rows <= WINDOW_SIZE_MAX and 0 < request.window_cols <= WINDOW_SIZE_MAX:
        pixels = request.window_xpixels, request.window_ypixels
        resize_window(master, request.window_rows, request.window_cols, *pixels)
    # The first terminal a session leader opens becomes its controlling terminal.
    actions: Actions = [
        (os.POSIX_SPAWN_OPEN, 0, terminal, os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]
    try:
        pid = _spawn(name, argv, environment, actions)
    except RefusalError:
        _close_all([master, slave])
        raise
    os.set_blocking(master, False)
    return Target(pid, master, master, -1, slave)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _spawn(name: bytes, argv: list[bytes], environment: dict[bytes, bytes], actions: Actions) -> int:
    """The pid of the first file called `name` that can be executed, as execvp() looks for it. Raises RefusalError."""
    refused = 0
    for path in _candidates(name, environment):
        if not os.path.exists(path):
            continue
        try:
            return _spawn_file(path, argv, environment, actions)
        except PermissionError as error:
            refused = error.errno or 0
        except OSError as error:
            raise _cannot_execute(name, error) from error
    if refused:
        raise _cannot_execute(name, PermissionError(refused, os.strerror(refused)))
    shown = os.fsdecode(name)
    reason = os.strerror(errno.ENOENT) if b"/" in name else "command not found"
    raise RefusalError(f"{shown}: {reason}", messages.NOT_FOUND, error=errno.ENOENT, subject=name)


def _candidates(name: bytes, environment: dict[bytes, bytes]) -> list[bytes]:
    if not name:
        return []
    if b"/" in name:
        return [name]
    # An empty part of PATH is the current directory.
    return [os.path.join(directory or b".", name) for directory in environment[b"PATH"].split(b":")]


def _spawn_file(path: bytes, argv: list[bytes], environment: dict[bytes, bytes], actions: Actions) -> int:
    ignored = find_ignored()
    try:
        return os.posix_spawn(
            path, argv, environment, file_actions=actions, setsid=True, setsigmask=(), setsigdef=ignored
        )
    except OSError as error:
        if error.errno != errno.ENOEXEC or _is_program(path):
            raise
    # As execvp() does: a file of no known format is a script for the shell.
    script = [SHELL_OF_SCRIPTS, path, *argv[1:]]
    return os.posix_spawn(
        SHELL_OF_SCRIPTS, script, environment, file_actions=actions, setsid=True, setsigmask=(), setsigdef=ignored
    )


def _is_program(path: bytes) -> bool:
    """Whether a file is a program, which the kernel does not run if it is for another processor. No shell reads it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.read(fd, len(ELF)) == ELF
    except OSError:
        return False
    finally:
        os.close(fd)


def _cannot_execute(name: bytes, error: OSError) -> RefusalError:
    shown = os.fsdecode(name)
    code = error.errno or 0
    if code == errno.E2BIG:
        return RefusalError(f"{shown}: {error.strerror}", messages.TOO_LONG, error=code, subject=name)
    if code in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        return RefusalError(f"{shown}: {error.strerror}", messages.LIMIT, error=code, subject=name)
    if code in (errno.ENOENT, errno.ENOTDIR):
        # The file is there: what it needs to run (its interpreter, its loader) is not.
        return RefusalError(f"{shown}: its interpreter is not there", messages.NOT_EXECUTABLE, error=code, subject=name)
    return RefusalError(f"{shown}: {error.strerror}", messages.NOT_EXECUTABLE, error=code, subject=name)
