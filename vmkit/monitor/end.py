"""Finds why a machine ended, from what the monitor saw: QEMU's SHUTDOWN reason, its exit, the console. Pure."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from vmkit.machine.launch import MAX_DETAILS_CHARACTERS
from vmkit.machine.parts.part import KnownEnd
from vmkit.monitor.console import ConsoleTrouble, Trouble

# Beside those of the parts: what a machine's own options can cause.
_KNOWN = (
    KnownEnd(
        r"(qemu-system-\w+): unable to find CPU model '(.*)'",
        "qemu-exit",
        r"QEMU has no CPU model '\2'",
        r"list them: \1 -cpu help",
    ),
    KnownEnd(
        r"failed to set MSR|kvm\.c:\d+: \w+: Assertion",
        "qemu-exit",
        "KVM of this host opens but does not work",
        "use --accel tcg",
    ),
)


@dataclass(frozen=True, slots=True)
class End:
    """How a machine's life ended; expected means that a verb asked for it."""

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
    known: Sequence[KnownEnd] = (),
) -> End:
    """Why QEMU is gone. asked: `down` or `kill` was under way. ready: the guest had sent READY.

    trouble: the first on the console, init_error: init's last. A guest that was ready and powers off has met no panic,
    whatever its console shows; init powers it off after an error, too. known: what the parts of the machine know of
    QEMU's last words.
    """
    powered_off = ready and exit_.shutdown_reason == "guest-shutdown"
    if powered_off and init_error is not None and not asked:
        return End("power-off", f"the guest powered off after its init reported: {init_error.text}")
    if trouble is not None and not asked and not powered_off:
        return explain_trouble(trouble)
    return _explain_reason(exit_, ready=ready, asked=asked, known=known)


def _explain_reason(exit_: QemuExit, *, ready: bool, asked: bool, known: Sequence[KnownEnd]) -> End:
    """Returns the end by QEMU's reason, when the console shows no trouble."""
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
            return End("quit", "a QMP command ended QEMU", expected=True)
    if asked:
        return End("killed", f"QEMU ended with {exit_.how}", expected=True)
    return _explain_output(exit_, known)


def _explain_output(exit_: QemuExit, known: Sequence[KnownEnd]) -> End:
    """Why QEMU ended by itself, from its last words."""
    if exit_.status == -signal.SIGXFSZ:
        brief = f"QEMU ended with {exit_.how}: a file of its grew past the limit"
        hint = "the guest's memory is a file, too; raise the limit: ulimit -f unlimited"
        return End("limit", brief, details=exit_.output, hint=hint)
    for end in (*known, *_KNOWN):
        if words := re.search(end.pattern, exit_.output):
            return End(end.reason, words.expand(end.brief), details=exit_.output, hint=words.expand(end.hint))
    return End("qemu-exit", f"QEMU ended with {exit_.how}", details=exit_.output)


def render_details(end: End, console: str, kernel: str) -> str:
    """What a person needs beside the end's brief. console, kernel: the last lines of each.

    The kernel's are left out where the console has shown them.
    """
    parts = [end.details] if end.details else []
    if console and not end.expected:
        parts.append("the console's last lines:\n" + console)
    # A kernel that prints to the console puts its messages there, too.
    last = kernel.rpartition("\n")[2].partition("] ")[2]
    if kernel and not end.expected and not (last and last in console):
        parts.append("the kernel's last lines, from the guest's memory:\n" + kernel)
    return "\n".join(parts)


def plan_ending(end: End, details: str, pid: int, at_s: float) -> dict[str, object]:
    """The record of an end, which outlives the machine. pid: the monitor's. at_s: seconds since 1970."""
    return {
        "pid": pid,
        "at": round(at_s, 3),
        "end": end.reason,
        "brief": end.brief,
        "expected": end.expected,
        "details": details[-MAX_DETAILS_CHARACTERS:],
        "hint": end.hint,
    }
