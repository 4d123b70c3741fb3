"""Why a machine ended, told from what was seen: QEMU's SHUTDOWN reason, its exit, the console. Pure."""

from dataclasses import dataclass

from vmkit.machine.console import ConsoleTrouble, Trouble


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


def explain_exit(exit_: QemuExit, trouble: ConsoleTrouble | None, *, ready: bool, asked: bool) -> End:
    """Why QEMU is gone. asked: `down` or `kill` was under way. ready: the guest had said READY."""
    if trouble is not None and not asked:
        return explain_trouble(trouble)
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
    return End("qemu-exit", f"QEMU ended with {exit_.how}", details=exit_.output)
