"""One step of `git bisect run`: runs a command in a machine, and judges the commit by how that ends.

To git, 0 is good, 125 says nothing of the commit, and every other status up to 127 is bad. So only what the kernel that
is tested did is bad; what this host did, and what cannot be told apart from that, is skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from vmkit.junit import CaseVerdict
from vmkit.ktap.parser import KtapParser
from vmkit.ktap.results import KtapResult, count_results
from vmkit.machine.machine import Machine
from vsh.command import run_into
from vsh.ending import KERNEL_ENDS, Ending, await_ending, read_ending
from vsh.errors import ExecError, VshError
from vsh.process import SIGNALLED
from vsh.pump import Sink, TimedOut
from vsh.registry import find_machine
from vsh.stdio import FdSink

# Ends of a kernel that did not come up.
BOOT_ENDS = KERNEL_ENDS | {"timeout", "init-error", "power-off"}
# The shell's words for a command that it cannot run, and the test's own for skip.
NOT_JUDGED = (125, 126, 127)
# A guest that works answers in time even under emulation.
ANSWER_S = 30.0


class CommitVerdict(IntEnum):
    """What git takes."""

    GOOD = 0
    BAD = 1
    SKIP = 125


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, and in a line why."""

    verdict: CommitVerdict
    why: str


class WatchedSink(FdSink):
    """A descriptor that gets a stream, whose test results are read beside."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, is_shared=True)
        # All of it has to be seen.
        self.is_spliceable = False
        self.parser = KtapParser()
        self.results: list[KtapResult] = []

    def write(self, pieces: list[memoryview | bytes]) -> int:
        taken = left = super().write(pieces)
        for piece in pieces:
            self.results += self.parser.receive_data(bytes(piece[:left]))
            left -= min(left, len(piece))
        return taken


def run_command(machine: Machine, argv: Sequence[str], timeout_s: float, *, has_ktap: bool) -> Judgement:
    """Runs the command in a machine that is ready, with this program's outputs, and judges. has_ktap: by the test
    results that it prints, too.
    """
    watched = WatchedSink(1) if has_ktap else None
    stdout: Sink = FdSink(1, is_shared=True) if watched is None else watched
    try:
        status = run_into(machine.connect(), argv, stdout, FdSink(2, is_shared=True), timeout_s)
    except TimedOut:
        return Judgement(CommitVerdict.BAD, f"the command did not end within {timeout_s:g} s")
    except ExecError as error:
        return Judgement(CommitVerdict.SKIP, error.brief)
    except VshError as error:
        return _judge_loss(machine, error)
    if watched is None or status:
        return judge_status(status)
    results = [*watched.results, *watched.parser.receive_end()]
    return judge_tests(results, has_found=watched.parser.has_found)


def judge_status(status: int) -> Judgement:
    """status: 128+N for signal N."""
    if status in NOT_JUDGED:
        meaning = "asks to skip the commit" if status == NOT_JUDGED[0] else "means that the command could not be run"
        return Judgement(CommitVerdict.SKIP, f"the command ended with status {status}, which {meaning}")
    how = f"signal {status - SIGNALLED} ended the command" if status > SIGNALLED else f"status {status}"
    return Judgement(CommitVerdict.BAD if status else CommitVerdict.GOOD, how)


def judge_tests(results: Sequence[KtapResult], *, has_found: bool) -> Judgement:
    """Judges by the results of tests. Those that ran may all be skipped, which says nothing."""
    if not has_found:
        return Judgement(CommitVerdict.SKIP, "the command printed no test results")
    counts = count_results(results)
    if any(result.is_bad for result in results):
        return Judgement(CommitVerdict.BAD, counts)
    passed = any(result.verdict is CaseVerdict.PASSED for result in results)
    return Judgement(CommitVerdict.GOOD if passed else CommitVerdict.SKIP, counts)


def judge_start(error: VshError, ending: Ending | None, *, boot_is_test: bool) -> Judgement:
    """Judges a machine that did not start. ending: how it ended, if it began to run."""
    is_kernel = ending is not None and ending.reason in BOOT_ENDS and not ending.is_expected
    return Judgement(CommitVerdict.BAD if boot_is_test and is_kernel else CommitVerdict.SKIP, error.brief)


def judge_loss(error: VshError, ending: Ending | None, *, is_hanging: bool) -> Judgement:
    """Judges a lost session. ending: of the machine, if it has ended. is_hanging: it runs and does not answer."""
    if ending is not None:
        return Judgement(CommitVerdict.BAD if ending.reason in KERNEL_ENDS else CommitVerdict.SKIP, ending.brief)
    if is_hanging:
        return Judgement(CommitVerdict.BAD, f"the guest hangs: {error.brief}")
    return Judgement(CommitVerdict.SKIP, error.brief)


def _judge_loss(machine: Machine, error: VshError) -> Judgement:
    name, pid = machine.started.name, machine.started.monitor.pid
    entry = find_machine(name=name)
    ending = read_ending(name, pid)
    is_silent = ending is None and not _is_answering(machine)
    if is_silent and entry is not None:
        # A busy host takes its time to record an end.
        ending = await_ending(entry, ANSWER_S)
    return judge_loss(error, ending, is_hanging=is_silent and entry is not None)


def _is_answering(machine: Machine) -> bool:
    try:
        machine.run(["true"], timeout=ANSWER_S)
    except ExecError:
        # Its vshd has answered.
        return True
    except VshError:
        return False
    return True
