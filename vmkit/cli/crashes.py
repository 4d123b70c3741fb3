"""The verb `crashes`."""

import shlex
import sys
import time
from pathlib import Path

import click

from vmkit.cli.show import print_json, print_table
from vmkit.cli.values import Number
from vmkit.crashes.place import find_crashes_folder
from vmkit.crashes.record import Crash, DumpFormat, FailedService, Program, ServiceEnd, render_crash
from vmkit.crashes.store import MAPS, KeptCrash, list_all, list_of, pick, remove, sweep
from vmkit.errors import ConfigError
from vmkit.machine.spec import check_name
from vmkit.memory.lines import strip_levels
from vsh.text import clean_line, clean_text, tail_lines

SHOW, GDB, REMOVE = "show", "gdb", "rm"
NUMBER = Number("number", 1)
MIB = 1 << 20
DMESG_LINES = 60
MAX_DMESG_BYTES = 8 * MIB
# Where Debian's packages of debug symbols put a kernel.
DEBUG_KERNEL = "/usr/lib/debug/boot/vmlinux-{}"


def complete_crashes(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Returns the names of the machines that crashes are kept of."""
    names = dict.fromkeys(kept.machine for kept in list_all(find_crashes_folder()))
    return [name for name in names if name.startswith(incomplete)]


@click.command("crashes")
@click.argument("name", required=False, shell_complete=complete_crashes)
@click.argument("action", required=False, type=click.Choice((SHOW, GDB, REMOVE)))
@click.argument("numbers", nargs=-1, type=NUMBER, metavar="[NUMBER]...")
@click.option(
    "--sysroot",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="With gdb: a folder with the guest's files, instead of those of its image or root.",
)
@click.option(
    "--program",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With gdb: the file of the program that crashed, such as your build with its symbols.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def crashes(
    *,
    name: str | None,
    action: str | None,
    numbers: tuple[int, ...],
    sysroot: Path | None,
    program: Path | None,
    as_json: bool,
) -> None:
    """List the crashes of machines, show one, or remove some.

    A crash stays when its machine has ended. NAME is a machine's name; without it vmkit lists all.
    `vmkit crashes NAME show` shows the newest crash, or that of a NUMBER. Of a panic it prints the kernel's last
    lines, and how to open the dump of `vmkit up --vmcore`. Of a program it prints where the core of
    `vmkit up --cores` is, and `vmkit crashes NAME gdb` prints its backtrace. Of a failed service it prints why it
    failed, and the last lines of its log. `vmkit crashes NAME rm NUMBER` removes a crash.
    """
    if action != GDB and (sysroot or program):
        raise ConfigError("--sysroot and --program are for gdb", hint=f"vmkit crashes {name or 'NAME'} gdb")
    root = find_crashes_folder()
    sweep(root)
    if name is None or action is None:
        found = list_all(root) if name is None else list_of(root, check_name(name))
        if as_json:
            print_json([render_kept(kept) for kept in found])
        else:
            _print_list(found, name)
        return
    check_name(name)
    if action in (SHOW, GDB):
        if len(numbers) > 1:
            raise ConfigError("vmkit shows one crash at a time", hint=f"vmkit crashes {name} {action} {numbers[0]}")
        kept = pick(root, name, numbers[0] if numbers else None)
        if action == SHOW:
            _show(kept, as_json=as_json)
        else:
            _print_backtrace(kept, sysroot, program, as_json=as_json)
        return
    if not numbers:
        raise ConfigError("rm needs the number of a crash", hint=f"vmkit crashes {name} lists them")
    # A wrong number removes nothing.
    for kept in [pick(root, name, number) for number in dict.fromkeys(numbers)]:
        remove(kept)
        print(f"crash {kept.number} of {kept.machine} is removed", flush=True)


def render_kept(kept: KeptCrash) -> dict[str, object]:
    """Returns a crash for JSON."""
    crash = kept.crash
    return {
        "machine": kept.machine,
        "number": kept.number,
        "folder": str(kept.folder),
        "bytes": kept.measure(),
        "error": kept.damage or None,
        "crash": None if crash is None else render_crash(crash),
    }


def _print_list(found: list[KeptCrash], name: str | None) -> None:
    if not found:
        print("no crash is kept" if name is None else f"no crash of '{name}' is kept", file=sys.stderr)
        return
    rows = [
        (
            kept.machine,
            str(kept.number),
            "-" if kept.crash is None else _render_time(kept.crash.at_s),
            f"{kept.measure() / MIB:.1f} MiB",
            _name_dump(kept.crash),
            clean_line(kept.damage if kept.crash is None else kept.crash.brief),
        )
        for kept in found
    ]
    print_table(("NAME", "NUMBER", "TIME", "SIZE", "DUMP", "WHAT"), rows)


def _name_dump(crash: Crash | None) -> str:
    if crash is None or (crash.dump is None and crash.program is None):
        return "-"
    return crash.kind.value if crash.dump is None else crash.dump.value


def _show(kept: KeptCrash, *, as_json: bool) -> None:
    if as_json:
        print_json(render_kept(kept))
        return
    crash = kept.crash
    if crash is None:
        print(f"{kept.machine} {kept.number}: {kept.damage}")
        print(f"folder:  {kept.folder}")
        return
    print(f"{kept.machine} {kept.number}: {clean_line(crash.brief)}")
    print(f"time:    {_render_time(crash.at_s)}")
    print(f"image:   {crash.image}" + (f", kernel {clean_line(crash.kernel)}" if crash.kernel else ""))
    if crash.trouble:
        print(f"{'no dump' if crash.program is None else 'missing'}: {clean_line(crash.trouble)}")
    if crash.program is not None:
        for line in explain_core(kept, crash.program):
            print(line)
    if crash.service is not None:
        for line in explain_service(crash.service):
            print(line)
    if crash.program is not None or crash.service is not None:
        return
    if crash.dump is not None:
        for line in explain_dump(kept, crash):
            print(line)
    _print_dmesg(kept)


def _print_backtrace(kept: KeptCrash, sysroot: Path | None, program: Path | None, *, as_json: bool) -> None:
    from vmkit.crashes.backtrace import print_backtrace  # noqa: PLC0415 - it reads images, which a list needs not

    def tell(text: str) -> None:
        print(clean_line(text), file=sys.stderr)

    printed = print_backtrace(kept, sysroot=sysroot, program=program, tell=tell)
    lines = printed.decode(errors="replace").splitlines()
    if as_json:
        print_json({**render_kept(kept), "backtrace": lines})
        return
    for line in lines:
        print(clean_line(line))


def explain_dump(kept: KeptCrash, crash: Crash) -> list[str]:
    """Returns what a person types to open a dump."""
    size = f"{crash.dump_bytes / MIB:.1f} MiB, {kept.measure() / MIB:.1f} MiB of it on the disk"
    vmlinux = find_vmlinux(crash)
    dump, kernel = shlex.quote(str(kept.dump)), shlex.quote(vmlinux)
    lines = [f"dump:    {kept.dump} ({size})", f"crash:   crash {kernel} {dump}"]
    if crash.dump is DumpFormat.ELF:
        lines.append(f"drgn:    drgn -c {dump} -s {kernel}")
    else:
        lines.append("drgn:    cannot read QEMU's kdump; --vmcore=elf keeps a dump that it reads")
    if not Path(vmlinux).exists():
        package = f"linux-image-{crash.kernel}-dbg" if crash.kernel else "its kernel with debug symbols"
        lines.append(f"         both need the kernel with its symbols, which is not there: Debian has {package}")
    return [clean_text(line) for line in lines]


def explain_core(kept: KeptCrash, program: Program) -> list[str]:
    """Returns what a person wants to know of a program's crash."""
    lines = [
        f"program: {program.exe}",
        f"command: {shlex.join(program.command)}",
        f"user:    uid {program.uid}, gid {program.gid}" + (", in a container" if program.is_contained else ""),
        *([f"cgroup:  {program.cgroup}"] if program.cgroup else []),
        f"core:    {kept.core} ({kept.measure() / MIB:.1f} MiB)",
        f"maps:    {kept.folder / MAPS}",
        f"gdb:     vmkit crashes {kept.machine} gdb {kept.number}",
    ]
    return [clean_text(line).replace("\n", " ") for line in lines]


def explain_service(service: FailedService) -> list[str]:
    """Returns what a person wants to know of a failed service."""
    how = {
        ServiceEnd.UNKNOWN: "did not run, or its end is unknown",
        ServiceEnd.EXITED: f"pid {service.pid} exited with {service.status}",
        ServiceEnd.KILLED: f"pid {service.pid} was ended by signal {service.status}",
        ServiceEnd.DUMPED: f"pid {service.pid} was ended by signal {service.status}, with a core",
    }
    after = f"{service.restarts} restarts" + (", and systemd starts it again" if service.is_restarted else "")
    lines = [
        f"service: {service.unit}",
        f"result:  {service.result}, after {after}",
        f"main:    {how[service.end]}",
        f"run:     {service.invocation}",
        f"failed:  {_render_time(service.time_s)} by the guest's clock",
    ]
    lines += ["", *service.log] if service.log else ["log:     the host has no lines of it"]
    return [clean_text(line).replace("\n", " ") for line in lines]


def find_vmlinux(crash: Crash) -> str:
    """Returns where the kernel with its symbols is, or would be."""
    return crash.vmlinux or DEBUG_KERNEL.format(crash.kernel or "RELEASE")


def _print_dmesg(kept: KeptCrash) -> None:
    try:
        with kept.dmesg.open("rb") as file:
            log = strip_levels(file.read(MAX_DMESG_BYTES))
    except OSError:
        print("dmesg:   the kernel's log was not found in the guest's memory")
        return
    print(f"dmesg:   {kept.dmesg}")
    print()
    print(tail_lines(log, DMESG_LINES))


def _render_time(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
