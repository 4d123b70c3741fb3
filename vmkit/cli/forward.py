"""The verb `forward`: lasting forwards, and the mapping of vsock to IPv6."""

import os
import sys
import time
from dataclasses import asdict

import click

from vmkit.cli.show import print_json, print_table
from vmkit.errors import ConfigError, MachineError
from vmkit.forward.registry import Kept, read_kept, read_log
from vmkit.forward.start import keep_forwards, remove
from vmkit.machine.running import find_named, pick_entry
from vsh.forward.spec import DYNAMIC, LOCAL, REMOTE, parse_forward, render_listening

LOG_LINES_SHOWN = 3
LOCAL_HELP = "Listen on the host and connect in the guest: 8080:localhost:80. All forms: vsh(1), FORWARDING."
REMOTE_HELP = "Listen in the guest and connect on the host: 5432:localhost:5432."
DYNAMIC_HELP = "Serve SOCKS 5 on the host; each client names a host and port of the guest: 1080."


@click.command("forward")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[NAME] | --ipv6 [-- COMMAND ...]")
@click.option("-L", "--local", "local", multiple=True, metavar="FORWARD", help=LOCAL_HELP)
@click.option("-R", "--remote", "remote", multiple=True, metavar="FORWARD", help=REMOTE_HELP)
@click.option("-D", "--dynamic", "dynamic", multiple=True, metavar="PORT", help=DYNAMIC_HELP)
@click.option("--auto", "is_auto", is_flag=True, help="Forward every TCP port that the guest listens on, until Ctrl-C.")
@click.option("--include", multiple=True, metavar="PORTS", help="With --auto: these ports alone, such as 80,8000-8099.")
@click.option("--exclude", multiple=True, metavar="PORTS", help="With --auto: not these ports.")
@click.option("--user", default="", metavar="USER", help="Connect in the guest as this user [default: vshd's].")
@click.option("--list", "is_list", is_flag=True, help="List the running forwards.")
@click.option("--remove", "removed", multiple=True, metavar="NUMBER", help="End this forward, or `all` (repeatable).")
@click.option("--ipv6", is_flag=True, help="Run COMMAND where [PREFIX::CID]:PORT leads to a guest's vsock port.")
@click.option(
    "--prefix", metavar="PREFIX", help="IPv6 prefix for --ipv6: a unique-local /64 [default: a random one per user]."
)
@click.option("--host-wide", is_flag=True, help="With --ipv6: map for the whole host (needs root).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def forward(  # noqa: PLR0913  (a verb is its options)
    *,
    words: tuple[str, ...],
    local: tuple[str, ...],
    remote: tuple[str, ...],
    dynamic: tuple[str, ...],
    is_auto: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    user: str,
    is_list: bool,
    removed: tuple[str, ...],
    ipv6: bool,
    prefix: str | None,
    host_wide: bool,
    as_json: bool,
) -> None:
    """Keep port forwards running in the background, or map vsock to IPv6.

    NAME is a machine's name. The forwards outlive this command and restarts of the guest. --auto alone stays in the
    foreground.
    """
    asked = [(LOCAL, text) for text in local] + [(REMOTE, text) for text in remote]
    asked += [(DYNAMIC, text) for text in dynamic]
    if sum((bool(asked), is_auto, is_list, bool(removed), ipv6)) != 1:
        raise ConfigError("give one of: -L, -R or -D, --auto, --list, --remove, --ipv6", hint="vmkit forward --help")
    if (prefix or host_wide) and not ipv6:
        raise ConfigError("--prefix and --host-wide go with --ipv6")
    if (include or exclude) and not is_auto:
        raise ConfigError("--include and --exclude go with --auto")
    if ipv6:
        sys.exit(_map(words, prefix, host_wide=host_wide))
    if is_auto:
        sys.exit(_follow(words, include, exclude, user, as_json=as_json))
    if is_list:
        _list(as_json=as_json)
    elif removed:
        _remove(removed)
    else:
        _keep(words, asked, user, as_json=as_json)


def _follow(
    words: tuple[str, ...], include: tuple[str, ...], exclude: tuple[str, ...], user: str, *, as_json: bool
) -> int:
    # Imported here: the other forwards run in a process of their own.
    from vmkit.forward.automatic import follow_ports, render_change, render_event, render_notice  # noqa: PLC0415

    def tell(text: str) -> None:
        print(f"vmkit: {text}", file=sys.stderr, flush=True)

    entry = pick_entry(_find_name(words))
    return follow_ports(
        entry.name,
        include,
        exclude,
        user=user,
        tell_change=lambda change: print(render_event(change) if as_json else render_change(change), flush=True),
        tell_notice=lambda text: print(render_notice(text), flush=True) if as_json else tell(text),
        tell_line=tell,
    )


def _find_name(words: tuple[str, ...]) -> str | None:
    if len(words) > 1:
        raise ConfigError("give one machine name", hint="only --ipv6 takes a command")
    return words[0] if words else None


def _keep(words: tuple[str, ...], asked: list[tuple[str, str]], user: str, *, as_json: bool) -> None:
    _find_name(words)
    forwards = [parse_forward(kind, text) for kind, text in asked]
    entry = find_named(words[0]) if words else pick_entry(None)
    if entry is None and any(forward.kind == REMOTE for forward in forwards):
        # -L and -D can wait for its machine; a listener in the guest needs one.
        pick_entry(words[0])
    kept = keep_forwards(entry.name if entry is not None else words[0], forwards, user=user)
    if as_json:
        print_json(asdict(kept))
        return
    for forward, text, place in zip(forwards, kept.forwards, kept.listening, strict=True):
        print(f"forward {kept.number}: {text}, {render_listening(forward, place)}")
    print(f"end it:  vmkit forward --remove {kept.number}", file=sys.stderr)
    if entry is None:
        print(f"no machine named '{words[0]}' is running; the forward serves the next one", file=sys.stderr)


def _list(*, as_json: bool) -> None:
    everything = read_kept()
    if as_json:
        print_json([asdict(kept) for kept in everything])
        return
    if not everything:
        print("no forward is running", file=sys.stderr)
        return
    rows = [
        (str(kept.number), kept.machine, asked, place, _render_age(kept))
        for kept in everything
        for asked, place in zip(kept.forwards, kept.listening, strict=True)
    ]
    print_table(("NUMBER", "MACHINE", "FORWARD", "LISTENING", "UP"), rows)
    for kept in everything:
        for line in read_log(kept.number).splitlines()[-LOG_LINES_SHOWN:]:
            print(f"{kept.number}: {line}", file=sys.stderr)


def _render_age(kept: Kept) -> str:
    minutes, seconds = divmod(max(0, int(time.time() - kept.started)), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


def _remove(words: tuple[str, ...]) -> None:
    everything = read_kept()
    wanted = everything if "all" in words else [kept for kept in everything if str(kept.number) in words]
    missing = set(words) - {str(kept.number) for kept in everything} - {"all"}
    if missing:
        known = ", ".join(str(kept.number) for kept in everything)
        hint = f"running forwards: {known}" if known else "no forward is running"
        raise MachineError(f"there is no forward {', '.join(sorted(missing))}", hint=hint)
    for kept in wanted:
        remove(kept)
        print(f"forward {kept.number} is gone", flush=True)


def _map(words: tuple[str, ...], prefix: str | None, *, host_wide: bool) -> int:
    # Imported here: few need it, and it needs much.
    from vmkit.forward.namespace import Mapping, choose_prefix, run_mapped  # noqa: PLC0415
    from vshd.carry.mapping import render_prefix  # noqa: PLC0415

    if not words and not host_wide:
        raise ConfigError("--ipv6 needs a command to run in its namespace: vmkit forward --ipv6 -- curl ...")
    chosen = choose_prefix(prefix)
    print(f"vmkit: CID N is {render_prefix(chosen).removesuffix('/64')}N", file=sys.stderr, flush=True)
    return run_mapped(Mapping(chosen, words, host_wide, os.geteuid(), os.getegid()))
