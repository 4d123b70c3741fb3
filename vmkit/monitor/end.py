"""Why a machine ended, told from what was seen: QEMU's SHUTDOWN reason, its exit, the console. Pure."""

import re
import signal
from dataclasses import dataclass

from vmkit.monitor.console import ConsoleTrouble, Trouble

# QEMU's words when it does not get its lock on an image (block/file-posix.c).
_LOCKED = re.compile(r"Failed to get .* lock\s+Is another process using the image \[(.*)\]\?")


@dataclass(frozen=True, slots=True)
class End:
    """How a machine's life ended; expected means that somebody asked for it."""

    reason: str
    brief: str
    expected: bool = False
    details: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class QemuExit:
    """What is known when the QEMU process is gone."""

    how: str
    status: int
    # `reason` of QEMU's SHUTDOWN event (qapi/run-state.json, ShutdownCause); empty when there was none.
    shutdown_reason: str
    output: str


def explain_trouble(trouble: ConsoleTrouble) -> End:
    """The end that a line on the console announces."""
    if trouble.kind is Trouble.PANIC:
        return End("panic", f"the guest's kernel panicked: {trouble.text or 'no reason given'}")
    return End("init-error", f"the guest's init failed: {trouble.text or 'no reason given'}")


def explain_exit(
    exit_: QemuExit,
    trouble: ConsoleTrouble | None,
    *,
    ready: bool,
    asked: bool,
    init_error: ConsoleTrouble | None = None,
) -> End:
    """Why QEMU is gone. asked: `down` or `kill` was under way. ready: the guest had said READY.

    trouble: the first on the console, init_error: init's last. A guest that was ready and powers off has met no panic,
    whatever its console shows; init powers it off after an error, too.
    """
    powered_off = ready and exit_.shutdown_reason == "guest-shutdown"
    if powered_off and init_error is not None and not asked:
        return End("power-off", f"the guest powered off after its init reported: {init_error.text}")
    if trouble is not None and not asked and not powered_off:
        return explain_trouble(trouble)
    return _explain_reason(exit_, ready=ready, asked=asked)


def _explain_reason(exit_: QemuExit, *, ready: bool, asked: bool) -> End:
    """From what QEMU said, where the console tells nothing."""
    match exit_.shutdown_reason:
        case "guest-shutdown":
            if ready or asked:
                return End("power-off", "the guest powered off", expected=True)
            return End("power-off", "the guest powered off before it was ready")
        case "guest-reset":
            return End(
                "reset",
                "the guest asked for a reset, which ends a machine here",
                expected=asked or ready,
            )
        case "guest-panic":
            return End("panic", "the guest's kernel panicked")
        case "host-qmp-quit":
            return End("quit", "QEMU was asked to quit", expected=True)
    if asked:
        return End("killed", f"QEMU ended with {exit_.how}", expected=True)
    return _explain_output(exit_)


def _explain_output(exit_: QemuExit) -> End:
    """Why QEMU ended by itself, from its last words."""
    if exit_.status == -signal.SIGXFSZ:
        brief = f"QEMU ended with {exit_.how}: a file of its grew past the limit"
        hint = "the guest's memory is a file, too; raise the limit: ulimit -f unlimited"
        return End("limit", brief, details=exit_.output, hint=hint)
    locked = _LOCKED.search(exit_.output)
    if locked is None:
        return End("qemu-exit", f"QEMU ended with {exit_.how}", details=exit_.output)
    brief = f"the disk {locked[1]} is in use by another machine or program"
    hint = "a writable disk can be attached to one machine only: stop the other machine, or use a copy"
    return End("disk-in-use", brief, details=exit_.output, hint=hint)
