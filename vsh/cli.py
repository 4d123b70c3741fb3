"""vsh as a person uses it: turns options into an address and a request, and joins a session to this process's stdio."""

import os
import sys

from vsh import address
from vsh.address import Address
from vsh.errors import ConnectionLost, ExecError, VshError
from vsh.flags import LASTING_KINDS, UNKNOWN_FLAG_STATUS, Options, split_command
from vsh.pump import deadline_after
from vsh.session import Session, make_limits, open_session
from vsh.shell import Shell
from vsh.stdio import is_background, replace_with_null
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vsh.record import Recorder

# What a guest's programs need to draw on this terminal, beside TERM.
TERMINAL_VARIABLES = (b"LANG", b"LC_ALL", b"LC_CTYPE", b"COLORTERM")
ADDRESSES = ("cid", "vm_name", "uds", "unix", "fd")
# Without a terminal to ask, the size of every terminal's ancestor.
FALLBACK_SIZE = (24, 80)


def run(options: Options) -> int:
    """Runs vsh with these options and returns its exit status. Raises VshError."""
    try:
        return _run(options)
    except VshError as error:
        _hint_at_name(error, options)
        raise


def _run(options: Options) -> int:
    """What the words alone show to be wrong is refused before a machine is looked for."""
    if options.stdin_null:
        if options.proxy or options.subsystem or options.forward_only:
            raise VshError("-n excludes --proxy, --subsystem and -N", status=UNKNOWN_FLAG_STATUS)
        replace_with_null(0, os.O_RDONLY)
    if options.record or options.record_format or options.record_input:
        from vsh.record import check_options  # noqa: PLC0415 - few sessions are recorded

        check_options(options)
    if options.fdpass and not options.proxy:
        raise VshError("--fdpass needs --proxy", hint="write vsh --proxy=PLACE --fdpass", status=UNKNOWN_FLAG_STATUS)
    if not options.given.isdisjoint(LASTING_KINDS):
        from vsh.lasting import command as lasting  # noqa: PLC0415 - sessions that end with vsh need none of it

        verb = lasting.check_options(options)
        return lasting.run(options, verb, _find_where(options))
    if options.subsystem:
        from vsh import subsystem  # noqa: PLC0415 - sessions that run commands need none of it

        subsystem.check_options(options)
        return subsystem.run_subsystem(options, _find_where(options))
    if not (options.proxy or options.local or options.remote or options.dynamic or options.forward_only):
        return _run_session(options, _find_where(options))
    from vsh.forward import command  # noqa: PLC0415 - sessions without forwards need none of it

    if options.proxy:
        target = command.parse_proxy(options)
        return command.run_proxy(options, target, _find_where(options))
    forwards = command.parse_forwards(options)
    where = _find_where(options)
    if options.forward_only:
        return command.run_forwards(options, forwards, where)
    with command.open_forwards(options, forwards, where):
        return _run_session(options, where)


def _find_where(options: Options) -> Address:
    """Returns the address with all that the options say of it: its token, its name, a container in it."""
    try:
        where = find_address(options)
    except address.NotReady as error:
        if error.entry.state == "stopping":
            from vsh.ending import explain_loss  # noqa: PLC0415 - only after a failure

            explain_loss(error, error.entry)
        raise
    where.token_file = options.token_file or where.token_file
    if options.alias:
        where.name = options.alias
    if options.target_container or options.listen_port is not None:
        if is_crun_wanted(options, where):
            if options.subsystem:
                raise VshError("--subsystem serves the guest, and not a container of it", status=UNKNOWN_FLAG_STATUS)
            options.is_crun = True
        else:
            where = find_container(where, options)
    return where


def is_crun_wanted(options: Options, where: Address) -> bool:
    """Whether the container is one that vmkit made in the guest. The guest is asked only where a launcher of the
    configuration might have another one of this name."""
    if options.listen_port is not None or not options.target_container or not options.extended:
        return False
    if not options.launch:
        return True
    if options.fd is not None:
        # It serves one session, and cannot be asked before.
        return False
    from vsh.crun import has_container  # noqa: PLC0415 - few have a launcher

    return has_container(where, options.target_container)


def _run_session(options: Options, where: Address) -> int:
    has_pty = wants_pty(options)
    if not is_recorded(options, where):
        return _join_session(options, where, (), has_pty=has_pty)
    from vsh.record import open_recorders  # noqa: PLC0415 - few sessions are recorded

    size = _find_size() if has_pty else (0, 0)
    with open_recorders(options, where, options.command, size, has_pty=has_pty) as recorders:
        return _join_session(options, where, recorders, has_pty=has_pty)


def is_recorded(options: Options, where: Address) -> bool:
    """Whether the user asked for a recording of this session, or of all sessions of the machine."""
    return bool(options.record or (where.entry is not None and where.entry.recordings))


def _join_session(options: Options, where: Address, recorders: "Sequence[Recorder]", *, has_pty: bool) -> int:
    request = make_request(options, has_pty=has_pty)
    if options.is_crun:
        enter_container(request, options, where)
    elif where.entry is not None and where.entry.container:
        from vsh.defaults import fill_request  # noqa: PLC0415 - few machines are of a container image

        fill_request(request, where.entry)
    limits = make_limits(int(options.keepalive * 1000)) if options.extended else None
    deadline_s = deadline_after(options.timeout or None)
    connect_s = min(filter(None, (options.timeout, options.connect_timeout)), default=0.0)
    session = open_session(where, request, limits=limits, timeout_s=connect_s, see=make_trace(options))
    if options.verbose or options.debug:
        mode = "extended" if session.connection.is_extended else "legacy"
        print(f"vsh: {where.name}: pid {session.pid}, {mode} mode", file=sys.stderr)
    shell = _make_shell(session, has_pty=has_pty)
    for recorder in recorders:
        recorder.attach(shell, has_input=options.record_input)
    try:
        status = shell.run(deadline_s)
        for recorder in recorders:
            recorder.status = status
        return status
    except ConnectionLost as error:
        session.explain(error)
        raise


def _hint_at_name(error: VshError, options: Options) -> None:
    """Adds a hint to the error of `vsh web`, which runs a command called web: how to name the machine web."""
    if not options.command or options.given.intersection(ADDRESSES) or options.alias:
        return
    if isinstance(error, ExecError) and error.kind != messages.NOT_FOUND:
        return
    from vsh import config, registry  # noqa: PLC0415 - only after a failure

    word = options.command[0]
    if word in {machine.name for machine in registry.read_machines()} | set(config.list_hosts()):
        error.hint = f"'{word}' was taken for a command; the machine is vsh --vm_name {word}"


def _make_shell(session: Session, *, has_pty: bool) -> Shell:
    if not has_pty:
        return Shell(session)
    from vsh.interactive import InteractiveShell  # noqa: PLC0415 - the terminal costs those without one nothing

    return InteractiveShell(session)


def make_trace(options: Options) -> "Callable[[str, memoryview], None] | None":
    if not options.debug:
        return None
    from vsh.trace import Trace  # noqa: PLC0415

    return Trace().see


def find_address(options: Options) -> Address:
    """Returns the address that the options name, or that of the only running machine. Raises VshError."""
    named = [name for name in ADDRESSES if getattr(options, name) not in (None, "")]
    if len(named) > 1:
        raise VshError("Exactly one of --cid or --vm_name is required", details=f"given: --{', --'.join(named)}")
    if options.cid is not None:
        return address.find_by_cid(options.cid, options.port)
    if options.vm_name:
        return address.find_by_name(options.vm_name, options.port)
    if options.uds:
        return Address.hybrid(options.uds, options.port)
    if options.unix:
        return Address.unix(options.unix)
    if options.fd is not None:
        return Address.descriptor(options.fd)
    return address.find_only(options.port)


def find_container(vm: Address, options: Options) -> Address:
    """Returns the address of a vshd in a container of `vm`. Raises VshError."""
    from vsh.container import DEFAULT_CONTAINER, open_container  # noqa: PLC0415 - few need it, and it needs threads

    name = options.target_container or DEFAULT_CONTAINER
    return open_container(vm, name, options.launch, options.listen_port, is_legacy=options.is_legacy_container)


def enter_container(request: SetupConnectionRequest, options: Options, where: Address) -> None:
    """Makes the request one for a container that vmkit made in the guest. Raises VshError."""
    from vsh import crun  # noqa: PLC0415 - few sessions are in containers

    crun.enter_container(request, options.target_container, "" if where.entry is None else where.entry.name)


def wants_pty(options: Options) -> bool:
    """Whether the session gets a pty. -t and -T decide; without them stdin and stdout must be terminals, as upstream.

    A terminal that belongs to another job (timeout, `&`) does not count: vsh can neither read it nor make it raw.
    """
    if options.tty or options.notty:
        return options.tty
    return os.isatty(0) and os.isatty(1) and not is_background(0)


def make_request(options: Options, *, has_pty: bool) -> SetupConnectionRequest:
    """Returns the setup request of the options."""
    environment: dict[bytes, bytes] = {}
    for name in (b"TERM", *(TERMINAL_VARIABLES if has_pty else ())):
        if name in os.environb:
            environment[name] = os.environb[name]
    for word in options.env:
        key, _, value = word.partition("=")
        environment[os.fsencode(key)] = os.fsencode(value)
    assignments, argv = split_command(options.command)
    environment.update(assignments)
    is_pid = options.cwd.isascii() and options.cwd.isdigit() and int(options.cwd) <= 0x7FFFFFFF
    rows, cols = _find_size() if has_pty else (0, 0)
    request = SetupConnectionRequest(
        target=os.fsencode(options.target_container) or messages.VM_SHELL,
        user=os.fsencode(options.user),
        env=environment,
        argv=argv,
        window_rows=rows,
        window_cols=cols,
        nopty=not has_pty,
        cwd=b"" if is_pid else os.fsencode(options.cwd),
        cwd_pid=int(options.cwd) if is_pid else 0,
    )
    if has_pty and options.extended:
        from vsh.terminal import find_window  # noqa: PLC0415 - see above

        request.window_xpixels, request.window_ypixels = find_window()[2:]
    return request


def _find_size() -> tuple[int, int]:
    from vsh.terminal import find_size  # noqa: PLC0415 - see above

    rows, cols = find_size()
    return (rows, cols) if rows else FALLBACK_SIZE
