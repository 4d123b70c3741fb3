"""What pid 1 does before vshd serves, as the words of its command line that are not vshd's say.

The order is the wall's: the kernel layer, then vshd's port, and only then the first program that is not ours, the
image's hook. docs/explanation/architecture.md, "The wall".
"""

import os

from vshd.carry import vsock
from vshd.signals import find_ignored

LOADER = "/usr/lib/vmkit/raise-wall"
LOOPBACK = "/sys/module/vsock_loopback"
MODULES_DISABLED = "/proc/sys/kernel/modules_disabled"
# The loader says one short sentence.
SENTENCE_LIMIT = 512
ENOENT, ENOEXEC = 2, 8

ON, OFF = "on", "off"


class DutyError(Exception):
    """The guest cannot come up as its image wants it; one line says why."""


class Duties:
    """The words, parsed. layers: those of the wall that the image wants. log: where programs send the lines of their
    logs. no_kernel: why there is no kernel layer. services: programs to start once vshd is ready. system: see
    vshd.pid1.system."""

    __slots__ = ("hook", "layers", "lock_modules", "log", "no_kernel", "require_kernel", "services", "system")

    def __init__(self) -> None:
        self.hook = ""
        self.layers: list[str] = []
        self.lock_modules = False
        self.log = ""
        self.no_kernel = ""
        self.require_kernel = False
        self.services: list[str] = []
        self.system = "none"


def take_duties(words: list[str]) -> tuple[Duties, list[str]]:
    """The duties in `words`, and the words left for vshd."""
    duties, rest = Duties(), []
    for word in words:
        name, _, value = word.partition("=")
        if name == "--init_hook":
            duties.hook = value
        elif name == "--init_wall":
            duties.layers = value.split(",")
        elif name == "--init_no_kernel":
            duties.no_kernel = value
        elif name == "--init_require_kernel":
            duties.require_kernel = True
        elif name == "--init_log":
            duties.log = value
        elif name == "--init_service":
            duties.services.append(value)
        elif name == "--init_system":
            duties.system = value
        elif name == "--init_lock_modules":
            duties.lock_modules = True
        else:
            rest.append(word)
    return duties, rest


def raise_kernel_layer(duties: Duties) -> str:
    """Loads the wall's programs into the kernel; the layer's state. Raises DutyError where the image needs it."""
    if "kernel" not in duties.layers:
        return OFF
    trouble = duties.no_kernel or _run_loader() or _try_loopback()
    if not trouble:
        return ON
    if duties.require_kernel:
        raise DutyError(f"the image demands the wall's kernel layer, which is missing: {trouble}")
    return f"missing: {trouble}"


def run_hook(path: str) -> None:
    """The image's set-up script, to its end. Raises DutyError when that is not 0."""
    try:
        try:
            pid = _spawn([path])
        except OSError as error:
            if error.errno != ENOEXEC:
                raise
            # A script that does not say what runs it: sh, as every shell has it.
            pid = _spawn(["/bin/sh", path])
    except OSError as error:
        raise DutyError(f"the image's hook {path} cannot be run: {error.strerror}") from error
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise DutyError(f"the image's hook {path} ended with status {status}")


def start_service(path: str) -> int:
    """Starts a program of the image that goes on beside vshd; its pid. Raises OSError."""
    return _spawn([path])


def lock_modules() -> None:
    """From now on no module can be loaded, until the guest ends. Raises DutyError."""
    try:
        fd = os.open(MODULES_DISABLED, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)
    except OSError as error:
        raise DutyError(f"cannot lock the kernel's modules: {error.strerror}") from error


def describe_wall(duties: Duties, kernel: str, allowed_cids: frozenset[int] | None) -> bytes:
    """The state of each layer, as found, for the host: a line each. kernel: what raise_kernel_layer said."""
    transport = OFF
    if "transport" in duties.layers:
        transport = "missing: vsock_loopback is loaded" if os.path.exists(LOOPBACK) else ON
    daemon = OFF
    if "daemon" in duties.layers:
        more = "any" if allowed_cids is None else ", ".join(map(str, sorted(allowed_cids - {vsock.HOST_CID})))
        daemon = f"missing: vshd also serves CID {more}" if more else ON
    states = (("TRANSPORT", transport), ("DAEMON", daemon), ("KERNEL", kernel))
    return "".join(f"WALL_{layer}={state}\n" for layer, state in states).encode("utf-8", "replace")


def prove_wall(facts: bytes) -> bytes:
    """The layers that describe_wall() found, found again: a snapshot's memory tells only how they were."""
    if b"WALL_TRANSPORT=on\n" in facts and os.path.exists(LOOPBACK):
        facts = facts.replace(b"TRANSPORT=on", b"TRANSPORT=missing: vsock_loopback is loaded")
    trouble = _try_loopback() if b"WALL_KERNEL=on\n" in facts else ""
    if trouble:
        facts = facts.replace(b"KERNEL=on", f"KERNEL=missing: {trouble}".encode("utf-8", "replace"))
    return facts


def _run_loader() -> str:
    """What the loader complains of; empty when it does not."""
    reading, writing = os.pipe()
    try:
        pid = _spawn([LOADER], stdout=writing)
    except OSError as error:
        if error.errno == ENOENT:
            return "the image was built without its program, for want of BTF in its kernel"
        return f"{LOADER}: {error.strerror}"
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read(SENTENCE_LIMIT)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        return ""
    if len(said) < 2:
        return f"{LOADER} ended with {status}"
    # The sentence, and the errno as one byte.
    return f"{said[:-1].decode(errors='replace')} ({os.strerror(said[-1])})"


def _try_loopback() -> str:
    """The programs are attached; whether the kernel asks them is another matter: tries a connect that must fail."""
    try:
        is_refused = vsock.is_loopback_refused()
    except vsock.VsockError as error:
        return str(error)
    return "" if is_refused else "its programs are attached, but not asked: 'bpf' is not in the kernel's list of LSMs"


def _spawn(argv: list[str], stdout: int = 1) -> int:
    """Starts a program with no stdin and the signals as the kernel gives them."""
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]]
    actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
    if stdout != 1:
        actions.append((os.POSIX_SPAWN_DUP2, stdout, 1))
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsigdef=find_ignored())
