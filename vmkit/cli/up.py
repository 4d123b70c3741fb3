"""The verb `vmkit up`: its options. vmkit.cli.boot does the work, and is imported while the monitor starts."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vmkit.cli.values import SECONDS, complete_startable, parse_gdb_port
from vmkit.errors import ConfigError
from vmkit.machine.handover import start_monitor
from vmkit.machine.options import OPTIONS, make_spec
from vmkit.machine.parts.part import Option, OptionKind
from vmkit.machine.parts.vmcore import FORMATS
from vmkit.machine.source import ANY, name_machine
from vmkit.machine.spec import MachineSpec
from vmkit.stored.place import is_stored
from vsh.registry import find_machine

if TYPE_CHECKING:
    from vmkit.shares.place import SharedPlace


def add_options(leave_out: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb every machine option that the table has for the command line, but for those it leaves out."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(OPTIONS):
            if option.flag and option.name not in leave_out:
                command = click.option(option.flag, option.name, **_plan_click(option))(command)
        return command

    return add


def _plan_click(option: Option) -> dict[str, Any]:
    """Returns click's settings of an option."""
    settings: dict[str, Any] = {"help": option.help, "show_default": option.shows_default}
    if option.metavar is not None:
        settings["metavar"] = option.metavar
    match option.kind:
        case OptionKind.TEXT:
            # Click would take the type of a number.
            return settings | {"type": str, "default": None if option.default is None else str(option.default)}
        case OptionKind.INTEGER:
            return settings | {"type": int, "default": option.default}
        case OptionKind.SECONDS:
            return settings | {"type": SECONDS, "default": option.default}
        case OptionKind.PATH:
            return settings | {"type": click.Path(path_type=Path)}
        case OptionKind.PATHS:
            return settings | {"type": click.Path(path_type=Path), "multiple": True}
        case OptionKind.CHOICE:
            return settings | {"type": click.Choice(option.words), "default": option.words[0]}
        case OptionKind.SWITCH:
            return settings | {"is_flag": True}
        case OptionKind.VALUED_SWITCH | OptionKind.CHOOSING_SWITCH:
            return settings | {"is_flag": False, "flag_value": option.words[0] if option.words else ""}


@click.command("up")
@click.argument("image", default="tiny", shell_complete=complete_startable)
@add_options()
@click.option("--wait-booted", is_flag=True, help="Wait until the guest's systemd has finished its boot, too.")
@click.option(
    "--share",
    "folders",
    multiple=True,
    metavar="HOST[:GUEST][:ro]",
    help="Share this folder of the host with the guest (repeatable; see `vmkit share`).",
)
@click.option("--console", is_flag=True, help="Show the guest's console while it boots.")
@click.option("--reuse", is_flag=True, help="Use the machine of that name if one runs or starts.")
@click.option("--dry-run", is_flag=True, help="Print the build plan and QEMU's command; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress, and print one line.")
def up(
    *,
    image: str,
    wait_booted: bool,
    folders: tuple[str, ...],
    console: bool,
    reuse: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Start a machine and wait until it is ready.

    IMAGE is a shipped image's name (see `vmkit images`; default: tiny), the path of your own recipe, the name of a
    machine that `vmkit create` made, or a root of yours. A path with a slash names a disk, a folder or a tar:
    ./disk.img. oci:PATH, docker-archive:PATH and docker://NAME name a container image, and - an archive on
    standard input.
    """
    image = _read_vmcore(_read_gdb(image, options), options)
    spec = _make_spec(image, options)
    places = _read_places(folders)
    # The rest of vmkit is imported while the monitor's interpreter starts: each takes a tenth of a second.
    with contextlib.ExitStack() as stack:
        if reuse:
            root = spec.source or spec.root or spec.root_from or ANY
            base = Path(image).stem if spec.image != ANY else name_machine(root)
            spec = replace(spec, name=spec.name or base)
        is_there = reuse and find_machine(name=spec.name) is not None
        monitor = None if dry_run or is_there else stack.enter_context(start_monitor())
        from vmkit.cli import boot  # noqa: PLC0415

        if dry_run:
            boot.print_plan(spec, as_json=as_json)
            return
        show = boot.Show(console=console, as_json=as_json, quiet=quiet, waits_booted=wait_booted)
        start = boot.boot_or_reuse if reuse else boot.boot
        shown = start(spec, monitor, show)
    # The machine stays from here on: a shell in a guest that does not boot is worth most.
    if places:
        _share(shown, places, quiet=as_json or quiet)
    if wait_booted:
        boot.await_booted(shown, spec.timeout_s, show)


def _read_places(folders: tuple[str, ...]) -> "list[SharedPlace]":
    if not folders:
        return []
    from vmkit.cli.share import read_places  # noqa: PLC0415 - most machines have no share

    return read_places(folders)


def _share(shown: dict[str, object], places: "list[SharedPlace]", *, quiet: bool) -> None:
    """Shares the folders that the machine does not have yet: one that --reuse found may have them."""
    from vmkit.cli.share import start_shares  # noqa: PLC0415
    from vmkit.shares.registry import read_shares  # noqa: PLC0415

    name = str(shown["name"])
    known = {(one.host, one.guest, one.read_only) for one in read_shares(name)}
    missing = [place for place in places if (str(place.host), place.guest, place.read_only) not in known]
    start_shares(name, missing, quiet=quiet)


def _make_spec(image: str, options: dict[str, Any]) -> MachineSpec:
    """A stored machine of that name comes before an image."""
    if not is_stored(image):
        return make_spec(image, options)
    from vmkit.machine.stored import make_stored_spec  # noqa: PLC0415 - most machines are of an image

    context = click.get_current_context()
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    return make_stored_spec(image, given)


def _read_gdb(image: str, options: dict[str, Any]) -> str:
    """Turns the one option into Python's `gdb` and `gdb_port`. Returns the image."""
    text = options["gdb"]
    port = parse_gdb_port(text)
    if text and port is None:
        image = _take_image(text, f"--gdb must be a port, not '{text}'", "--gdb alone serves a socket")
    options |= {"gdb": text is not None and port is None, "gdb_port": port}
    return image


def _read_vmcore(image: str, options: dict[str, Any]) -> str:
    """Returns the image, which can be the word behind `--vmcore`."""
    word = options["vmcore"]
    if word is None or word in FORMATS:
        return image
    options["vmcore"] = FORMATS[0]
    known = " or ".join(FORMATS)
    return _take_image(word, f"--vmcore must be {known}, not '{word}'", f"--vmcore alone keeps an {FORMATS[0]}")


def _take_image(word: str, brief: str, hint: str) -> str:
    """The image, where a word stands behind a switch and is no value of it: `--gdb debian`. Raises ConfigError."""
    if click.get_current_context().get_parameter_source("image") is not ParameterSource.DEFAULT:
        raise ConfigError(brief, hint=hint)
    return word
