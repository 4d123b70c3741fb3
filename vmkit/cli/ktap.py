"""The verb `vmkit ktap`."""

import os
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
    matter. A test that was planned and did not report is an error: the output may end anywhere.
    Exits with 0 if all tests passed, 1 if one failed or is missing, 2 if there are no results.
    """
    results, has_found = _read(file)
    if not has_found:
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
    if any(result.is_bad for result in results):
        sys.exit(1)


def _read(file: str) -> tuple[list[KtapResult], bool]:
    """Returns the results, and whether there was anything that can have results."""
    parser = KtapParser()
    results: list[KtapResult] = []
    for data in _read_pieces(file):
        results += parser.receive_data(data)
    results += parser.receive_end()
    return results, parser.has_found


def _read_pieces(file: str) -> Iterator[bytes]:
    try:
        if file == STDIN:
            while data := os.read(sys.stdin.fileno(), READ_BYTES):
                yield data
            return
        with Path(file).open("rb") as source:
            while data := source.read(READ_BYTES):
                yield data
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", status=UNUSABLE) from error


def _write(path: Path, report: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(report)
    except OSError as error:
        raise ConfigError(f"cannot write the report {path}: {error.strerror}", status=UNUSABLE) from error
