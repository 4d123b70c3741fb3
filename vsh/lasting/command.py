"""vsh's options for lasting sessions: --detach, --sessions, --attach, --output, --input, --signal, --wait, --forget."""

import json
import os
import signal
import sys
import time

from vsh.address import Address
from vsh.cli import enter_container, is_recorded, make_request, make_trace
from vsh.errors import ConnectionLost, UsageError
from vsh.flags import Options
from vsh.lasting import calls
from vsh.lasting.shells import Attached, AttachedTerminal, Typing, Watching
from vsh.pump import deadline_after
from vsh.session import make_limits
from vsh.shell import Shell
from vsh.stdio import is_background
from vsh.terminal import find_size
from vsh.text import clean_line
from vshd.wire import messages
from vshd.wire.kept import SessionRecord
from vshd.wire.requests import Attach, Lasting

# What a terminal gets of the past when --since is not given: some screens.
TAIL_BYTES = 1 << 15
# A whole list takes as long as a command's start at most.
LIST_TIMEOUT_S = 30.0
MODES = {"output": messages.OUTPUT, "input": messages.INPUT, "wait": messages.WAIT, "attach": messages.BOTH}
VERBS = ("detach", "sessions", "signal", "forget", *MODES)
# Options that belong to some verbs alone.
BELONGINGS = {
    "json": ("sessions",),
    "follow": ("output",),
    "since": ("output", "attach"),
    "eof": ("input", "attach"),
    "steal": ("attach", "input"),
    "output_size": ("detach",),
    "output_file": ("detach",),
}
SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SECOND, MINUTE, HOUR, DAY = 1, 60, 3600, 86_400


def check_options(options: Options) -> str:
    """The one verb that the options have; empty: none. Raises UsageError."""
    verbs = [verb for verb in VERBS if verb in options.given]
    if len(verbs) > 1:
        raise UsageError(f"--{verbs[0]} and --{verbs[1]} do not go together")
    verb = verbs[0] if verbs else ""
    for option, owners in BELONGINGS.items():
        if option in options.given and verb not in owners:
            raise UsageError(f"--{option} belongs to --{' or --'.join(owners)}")
    if not verb:
        return ""
    if any(getattr(options, name) for name in ("local", "remote", "dynamic", "forward_only", "proxy", "subsystem")):
        raise UsageError(
            f"--{verb} takes no forward and no subsystem", hint="a second vsh can forward at the same time"
        )
    if not options.extended:
        raise UsageError(f"--{verb} needs the extended protocol", hint="leave --noextended out")
    if verb == "signal":
        if len(options.command) != 1:
            raise UsageError("--signal takes one signal behind the session", hint="vsh --signal ID TERM")
        parse_signal(options.command[0])
    elif verb != "detach" and options.command:
        raise UsageError(f"--{verb} takes no command", hint=f"leave out '{options.command[0]}'")
    if verb == "detach":
        parse_size(options.output_size)
    return verb


def run(options: Options, verb: str, where: Address) -> int:
    """Runs one of the options; returns the exit status. Raises VshError."""
    timeout_s = min(filter(None, (options.timeout, options.connect_timeout)), default=0.0)
    if verb == "detach":
        print(_detach(options, where, timeout_s))
        return 0
    if verb == "sessions":
        records = calls.read_sessions(where, user=options.user, timeout_s=timeout_s or LIST_TIMEOUT_S)
        print(render_json(records) if options.json else render_table(records, time.time()), end="")
        return 0
    if verb == "signal":
        number = parse_signal(options.command[0])
        calls.send_signal(where, options.signal, number, user=options.user, timeout_s=timeout_s)
        return 0
    if verb == "forget":
        calls.forget(where, options.forget, user=options.user, timeout_s=timeout_s)
        return 0
    return _attach(options, verb, where, timeout_s)


def parse_signal(text: str) -> int:
    """The number of a signal's name, with or without SIG, or of its number. Raises UsageError."""
    name = text.upper().removeprefix("SIG")
    if text.isascii() and text.isdigit() and 0 < int(text) <= messages.SIGNAL_MAX:
        return int(text)
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        raise UsageError(f"'{text}' is no signal", hint="a name such as TERM, or a number from 1 to 64") from None


def parse_size(text: str) -> int:
    """The bytes of a size such as 16M; 0 for empty text. Raises UsageError."""
    if not text:
        return 0
    digits = text.rstrip("".join(SUFFIXES))
    factor = SUFFIXES.get(text[len(digits) :])
    if factor is None or not (digits.isascii() and digits.isdigit()) or len(digits) > len(str(1 << 40)):
        raise UsageError(f"--output_size must be a number of bytes, with K, M or G behind it, not '{text}'")
    return int(digits) * factor


def _detach(options: Options, where: Address, timeout_s: float) -> str:
    request = make_request(options, has_pty=options.tty)
    if options.is_crun:
        enter_container(request, options, where)
    lasting = Lasting(
        name=os.fsencode(options.detach), size=parse_size(options.output_size), file=os.fsencode(options.output_file)
    )
    return calls.start(where, request, lasting, timeout_s=timeout_s)


def _attach(options: Options, verb: str, where: Address, timeout_s: float) -> int:
    name = getattr(options, verb)
    is_terminal = os.isatty(0) and os.isatty(1) and not is_background(0) and not options.notty
    mode = messages.FOLLOW if options.follow else MODES[verb]
    rows, cols = find_size() if is_terminal and verb == "attach" else (0, 0)
    attach = Attach(
        session=os.fsencode(name),
        user=os.fsencode(options.user),
        mode=mode,
        since=options.since or 0,
        tail=TAIL_BYTES if is_terminal and verb == "attach" and options.since is None else 0,
        steal=options.steal,
        closes=options.eof,
        rows=rows,
        cols=cols,
    )
    limits = make_limits(int(options.keepalive * 1000))
    deadline_s = deadline_after(options.timeout or None)
    session, position = calls.open_attached(where, attach, timeout_s=timeout_s, limits=limits, see=make_trace(options))
    has_pty = verb == "attach" and is_terminal and position.has_pty
    shell: Shell
    if verb == "attach":
        shell = AttachedTerminal(session, name) if has_pty else Attached(session)
    else:
        shell = Typing(session) if verb == "input" else Watching(session)
    try:
        with session:
            status = _run_shell(shell, options, where, deadline_s, (rows, cols) if has_pty else (0, 0))
    except ConnectionLost as error:
        session.explain(error)
        error.hint = error.hint or f"the session goes on: vsh --{verb} {name}"
        raise
    if options.verbose:
        print(f"vsh: the output goes on at offset {session.connection.offset}", file=sys.stderr)
    # A script wants to know whether the output was read, or the input taken.
    return 0 if verb in ("output", "input") else status


def _run_shell(shell: Shell, options: Options, where: Address, deadline_s: float | None, size: tuple[int, int]) -> int:
    if not is_recorded(options, where):
        return shell.run(deadline_s)
    from vsh.record import open_recorders  # noqa: PLC0415 - few sessions are recorded

    words = [f"--{name}={getattr(options, name)}" for name in ("attach", "output") if name in options.given]
    with open_recorders(options, where, words, size, has_pty=shell.has_pty) as recorders:
        for recorder in recorders:
            recorder.attach(shell, has_input=options.record_input)
        status = shell.run(deadline_s)
        for recorder in recorders:
            recorder.status = status
        return status


def render_json(records: list[SessionRecord]) -> str:
    """The list for programs."""
    return json.dumps([_to_json(record) for record in records], indent=2) + "\n"


def _to_json(record: SessionRecord) -> dict[str, object]:
    is_known = record.pid > 0
    return {
        "id": record.id.decode("ascii", "replace"),
        "name": record.name.decode("ascii", "replace") or None,
        "state": describe_state(record).split(" ")[0],
        "user": record.user.decode(errors="replace") or None,
        "uid": record.uid,
        "pid": record.pid or None,
        "command": record.command.decode(errors="replace"),
        "started_s": record.started_s or None,
        "ended_s": record.ended_s or None,
        "exit": (128 + record.signal if record.signal else record.code) if record.has_ended else None,
        "signal": record.signal if record.has_ended else None,
        "output_start": record.start if is_known else None,
        "output_end": record.end if is_known else None,
        "output_size": record.size if is_known else None,
        "output_file": record.file.decode(errors="replace") or None,
        "clients": record.watchers,
        "has_writer": record.has_writer,
        "has_terminal": record.has_pty,
    }


def describe_state(record: SessionRecord) -> str:
    """running, ended with how, or silent: the process that keeps it does not answer."""
    if not record.pid:
        return "silent"
    if not record.has_ended:
        return "running"
    return f"ended (signal {record.signal})" if record.signal else f"ended ({record.code})"


def render_table(records: list[SessionRecord], now_s: float) -> str:
    """The list for people."""
    rows = [("ID", "NAME", "USER", "STATE", "AGE", "OUTPUT", "COMMAND")]
    for record in records:
        command = clean_line(record.command) or ("(login shell)" if record.pid else "-")
        age = _describe_age(now_s - record.started_s) if record.started_s else "-"
        cells = (record.id, record.name, record.user)
        texts = [clean_line(cell) or "-" for cell in cells]
        rows.append((texts[0], texts[1], texts[2], describe_state(record), age, str(record.end), command))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "".join(f"{line}\n" for line in lines)


def _describe_age(seconds: float) -> str:
    for letter, unit in (("d", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= unit:
            return f"{int(seconds // unit)} {letter}"
    return f"{max(0, int(seconds))} s"
