"""The verb `vmkit ktap`."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from vmkit.cli.statuses import JudgedCommand
from vmkit.errors import ConfigError
from vmkit.junit import render_junit
from vmkit.ktap.parser import KtapParser
from vmkit.ktap.results import KtapResult, count_results, make_case, render_bad

STDIN = "-"
READ_BYTES = 256 * 1024
# No test has been judged.
UNUSABLE = 2
SUITE = "ktap"


@click.command("ktap", cls=JudgedCommand, usage_status=UNUSABLE)
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write a JUnit report to this file.")
@click.option("-q", "--quiet", is_flag=True, help="Print the last line alone.")
def ktap(*, file: str, junit: Path | None, quiet: bool) -> None:
    """Read test results of a kernel: KTAP, kselftest, KUnit and TAP.

    FILE is a test's output, a kernel's log or a console's; - is standard input. Time stamps before the lines do not
    matter. A test that was planned and did not report is an error: the output may end anywhere, also by Ctrl-C.
    Exits with 0 if all tests passed, 1 if one failed or is missing, 2 if there are no results.
    """
    parser = KtapParser()
    results, interruption = _read(file, parser)
    if not parser.has_found:
        if interruption is not None:
            raise interruption
        name = "standard input" if file == STDIN else file
        raise ConfigError(
            f"found no test results in {name}",
            hint="they begin with a line such as 'KTAP version 1' or 'TAP version 13'",
            status=UNUSABLE,
        )
    if junit is not None:
        _write(junit, render_junit(SUITE, (make_case(result, SUITE) for result in results)))
    if not quiet:
        for line in render_bad(results):
            print(line)
    print(count_results(results))
    if interruption is not None:
        raise interruption
    if any(result.is_bad for result in results):
        sys.exit(1)


def _read(file: str, parser: KtapParser) -> tuple[list[KtapResult], BaseException | None]:
    """Returns the results, and the signal that ended the reading, if one did: what came before it counts."""
    results: list[KtapResult] = []
    interruption: BaseException | None = None
    try:
        with _open(file) as fd:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            is_open = True
            while is_open:
                # A signal ends this wait, and no other step: a piece that was read would be lost, or half taken.
                poll.poll()
                with _hold_signals():
                    data = os.read(fd, READ_BYTES)
                    results += parser.receive_data(data)
                    is_open = bool(data)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", status=UNUSABLE) from error
    except Exception:
        raise
    except BaseException as error:
        interruption = error
    results += parser.receive_end("interrupted" if interruption is not None else "")
    return results, interruption


@contextlib.contextmanager
def _open(file: str) -> Iterator[int]:
    if file == STDIN:
        yield sys.stdin.fileno()
        return
    with Path(file).open("rb") as source:
        yield source.fileno()


@contextlib.contextmanager
def _hold_signals() -> Iterator[None]:
    """A signal in the block comes at its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write(path: Path, report: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(report)
    except OSError as error:
        raise ConfigError(f"cannot write the report {path}: {error.strerror}", status=UNUSABLE) from error
