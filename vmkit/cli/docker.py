"""The verbs `vmkit docker ...`: the project in a container, without privileges."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from vmkit.cli.show import open_progress
from vmkit.docker.build import TARGETS, BuildSpec, build_docker_image, tag_of
from vmkit.docker.container import RunSpec, check_terminal, run_container
from vmkit.docker.context import find_context
from vmkit.docker.devices import choose_devices
from vmkit.docker.engine import find_host, is_local, open_engine
from vmkit.machine.doctor import examine

DEFAULT_RESULTS = "vmkit-results"

network_option = click.option(
    "--network", default="none", show_default=True, metavar="NETWORK", help="The container's network."
)
image_option = click.option("--image", metavar="IMAGE", help="The image to run [default: the one that `build` made].")
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Copy the files in /results to this folder.",
)
results_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help=f"Copy the files in /results to this folder [default: {DEFAULT_RESULTS}].",
)
user_option = click.option("--user", default="", metavar="USER", help="User in the container [default: the image's].")
env_option = click.option(
    "-e", "--env", "env", multiple=True, metavar="NAME=VALUE", help="Set a variable (repeatable)."
)
RACE = 'vmkit bench --out /results/bench.json "$@" && vmkit bench report /results/bench.json'
TARGET_HELP = "Stage to build: the programs (run), or with the test suite (test)."
PASS_ON = {"ignore_unknown_options": True}


@click.group("docker", context_settings={"help_option_names": ["-h", "--help"]})
def docker() -> None:
    """Use vmkit in a Docker container: build, shell, run, test, bench.

    vmkit uses the engine at $DOCKER_HOST, or at the default socket if that is not set.
    """


@docker.command("build")
@click.argument("context", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--target", type=click.Choice(TARGETS), default="run", show_default=True, help=TARGET_HELP)
@click.option("--tag", metavar="TAG", help="Name of the image [default: vmkit or vmkit:test].")
@click.option("--base", default="", metavar="IMAGE", help="Debian image to start from [default: the Dockerfile's].")
@click.option("--network", default="", metavar="NETWORK", help="Network of the build steps, such as `host`.")
@click.option("--locked", is_flag=True, help="Use exactly the packages in the guest image's lock file.")
@click.option("--no-cache", "fresh", is_flag=True, help="Run every step anew.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress and no log.")
def build(
    *,
    context: Path | None,
    target: str,
    tag: str | None,
    base: str,
    network: str,
    locked: bool,
    fresh: bool,
    quiet: bool,
) -> None:
    """Build the Docker image.

    CONTEXT is a checkout (default: the current one).
    """
    spec = BuildSpec(
        find_context(context),
        target,
        tag or tag_of(target),
        base=base,
        network=network,
        arguments={"LOCKED": "1"} if locked else {},
        fresh=fresh,
    )
    with open_engine() as engine, open_progress(quiet=quiet) as tell:
        image = build_docker_image(engine, spec, tell, _ignore if quiet or sys.stderr.isatty() else _log)
        size_mb = engine.inspect_image(image)["Size"] / 1e6
    print(f"{spec.tag} is built: {image.removeprefix('sha256:')[:12]}, {size_mb:.0f} MB")


@docker.command("shell")
@image_option
@network_option
@user_option
@env_option
def shell(*, image: str | None, network: str, user: str, env: tuple[str, ...]) -> None:
    """Open a shell in a new container; the container ends with it."""
    check_terminal(asked=True)
    _run(image or tag_of("run"), ("bash",), interactive=True, network=network, user=user, env=env, out=None)


@docker.command("run", context_settings=PASS_ON)
@image_option
@network_option
@user_option
@env_option
@out_option
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin, and the terminal if stdin is one.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    *,
    image: str | None,
    network: str,
    user: str,
    env: tuple[str, ...],
    out: Path | None,
    interactive: bool,
    command: tuple[str, ...],
) -> None:
    """Run a command in a new container, and exit with its status."""
    _run(image or tag_of("run"), command, interactive=interactive, network=network, user=user, env=env, out=out)


@docker.command("test", context_settings=PASS_ON)
@image_option
@network_option
@env_option
@results_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def test(
    *, image: str | None, network: str, env: tuple[str, ...], out: Path | None, arguments: tuple[str, ...]
) -> None:
    """Run the tests in a new container.

    vmkit passes ARGUMENTS to pytest. It copies the report and the logs of failed tests to the host.
    """
    command = ("python3", "-m", "pytest", "--junitxml=/results/junit.xml", *arguments)
    target = out or Path(DEFAULT_RESULTS)
    _run(image or tag_of("test"), command, interactive=False, network=network, user="", env=env, out=target)


@docker.command("bench", context_settings=PASS_ON)
@image_option
@click.option(
    "--network",
    default="bridge",
    show_default=True,
    metavar="NETWORK",
    help="The container's network; vmkit downloads packages for the image bench over it.",
)
@env_option
@results_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(
    *, image: str | None, network: str, env: tuple[str, ...], out: Path | None, arguments: tuple[str, ...]
) -> None:
    """Run the benchmark in a new container.

    vmkit passes ARGUMENTS to `vmkit bench`. It copies the figures, the plots and the page to the host.
    """
    command = ("sh", "-c", RACE, "vmkit", *arguments)
    target = out or Path(DEFAULT_RESULTS)
    _run(image or tag_of("test"), command, interactive=False, network=network, user="", env=env, out=target)


def _run(
    image: str,
    command: tuple[str, ...],
    *,
    interactive: bool,
    network: str,
    user: str,
    env: tuple[str, ...],
    out: Path | None,
) -> None:
    environment = dict(_parse_environment(env))
    tty = interactive and check_terminal(asked=False)
    with open_engine() as engine:
        passed = choose_devices(examine(), local=is_local(find_host()))
        for line in passed.lines:
            _tell(line)
        spec = RunSpec(
            image,
            command,
            passed,
            interactive=interactive,
            tty=tty,
            network=network,
            user=user,
            out=out,
            environment=environment,
        )
        status = run_container(engine, spec, _tell)
    sys.exit(status)


def _parse_environment(words: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"'{word}' is not NAME=VALUE", param_hint="--env")
        yield name, value


def _tell(text: str) -> None:
    print(f"vmkit: {text}", file=sys.stderr, flush=True)


def _log(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"  {line}", file=sys.stderr, flush=True)


def _ignore(_line: str) -> None:
    pass
