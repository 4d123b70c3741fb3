"""The blocks of tests that are open: which block a line is of, and what is missing when one ends. Pure.

A block that is deeper than another has the subtests of the *next* result of that: KTAP names a test only when it has
ended. So a block keeps its results until then, and the outermost gives its own away with the next line.
"""

from typing import assert_never

from vmkit.junit import CaseVerdict
from vmkit.ktap.blocks import (
    MAX_DEPTH,
    MAX_LOG_CHARACTERS,
    MAX_MISSING,
    MAX_NAME_CHARACTERS,
    MAX_PASSED_LOG_CHARACTERS,
    Allowance,
    Block,
    Leaf,
)
from vmkit.ktap.lines import (
    BailOutLine,
    BootLine,
    Line,
    PanicLine,
    PlanLine,
    ResultLine,
    StartLine,
    SubtestLine,
    VersionLine,
    measure,
)
from vmkit.ktap.results import BAD, KtapResult

HEADING = "selftests: "
RUNNING = "was running when the output ended"
REBOOTED = "was running when the machine restarted"
DID_NOT_RUN = "did not run"
NO_RESULT = "did not report a result"
NO_TEST = "did not report any test"


class Stream:
    """The blocks of one source of lines: the kernel's log, or what a program printed.

    Invariant: each of `_blocks` is open and wider than the one before. `_loose` are results of blocks that are closed.
    """

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._blocks: list[Block] = []
        self._loose: list[Leaf] = []
        # Of a block that has not begun.
        self._subtest = ""
        # The result of the line before, and the columns of the YAML behind it.
        self._latest: Leaf | None = None
        self._yaml = 0
        self.has_found = False

    @property
    def is_busy(self) -> bool:
        """Whether a test may run."""
        outermost = self._blocks[0] if self._blocks else None
        return outermost is not None and (len(self._blocks) > 1 or outermost.plan is None or outermost.left > 0)

    def take(self, line: Line, *, is_last: bool = False) -> list[KtapResult]:
        """Takes the next line. Returns the results that no later line can change. is_last: the line has no end."""
        if self._latest is not None and self._take_yaml(line, self._latest):
            return []
        self._latest, self._yaml = None, 0
        results = self._give()
        # By frequency.
        match line.kind:
            case None | BootLine():
                self.keep(line)
            case ResultLine():
                self._take_result(line, line.kind, is_last=is_last)
            case VersionLine():
                self._take_version(line, line.kind)
            case PlanLine():
                self._take_plan(line, line.kind)
            case SubtestLine():
                self._take_name(line, line.kind.name[:MAX_NAME_CHARACTERS])
            case StartLine():
                self._take_start(line, line.kind.name[:MAX_NAME_CHARACTERS])
            case BailOutLine():
                self.keep(line)
                block = self._find(line.indent)
                if block is not None:
                    block.bail_out = line.kind.reason
            case PanicLine():
                self.panic(line.kind.reason)
                self.keep(line)
            case _:
                assert_never(line.kind)
        return results

    def keep(self, line: Line) -> None:
        """Adds a line to the log of the test that runs. It may be of another source."""
        if not self._blocks:
            return
        block = self._blocks[-1]
        if "#" in line.indent and not line.indent.startswith(block.indent):
            # A remark belongs to the deepest block that it is indented like.
            block = next((one for one in reversed(self._blocks) if line.indent.startswith(one.indent)), block)
        block.keep(line.text)

    def panic(self, reason: str) -> None:
        """Ends the test that runs."""
        if self._blocks and self._blocks[-1].panic is None:
            self._blocks[-1].panic = reason

    def end(self, running: str) -> list[KtapResult]:
        """Takes the end of the output. running: the words for the test that runs."""
        results = self._give()
        while len(self._blocks) > 1:
            self._fold(running)
        if self._blocks:
            self._close_outermost(running)
        self._subtest, self._latest, self._yaml = "", None, 0
        return results + self._give()

    def _give(self) -> list[KtapResult]:
        if self._blocks and self._blocks[0].leaves:
            self._loose += self._blocks[0].leaves
            self._blocks[0].leaves = []
        if not self._loose:
            return []
        leaves, self._loose = self._loose, []
        return [leaf.seal() for leaf in leaves]

    def _take_yaml(self, line: Line, latest: Leaf) -> bool:
        """Takes a line of the YAML that TAP has behind a result, for the log of that. Returns whether it was one."""
        if not self._yaml and "---" not in line.text:
            return False
        words = line.text.strip()
        width = measure(line.indent)
        if not self._yaml:
            if words != "---" or width <= self._blocks[-1].width:
                return False
            self._yaml = width
        elif line.kind is not None and width < self._yaml:
            # It never ended.
            return False
        if len(latest.log) < MAX_LOG_CHARACTERS:
            latest.log += ("\n" if latest.log else "") + self._allowance.take_log([line.text], MAX_LOG_CHARACTERS)
        if words == "...":
            self._latest = None
        return True

    def _take_version(self, line: Line, version: VersionLine) -> None:
        width = measure(line.indent)
        while len(self._blocks) > 1 and self._blocks[-1].width >= width:
            self._fold("")
        if self._blocks and self._blocks[-1].width >= width:
            self._close_outermost("")
        if self._open(line.indent, is_declared=True, is_tap=version.is_tap) is None:
            self.keep(line)

    def _take_plan(self, line: Line, plan: PlanLine) -> None:
        block = self._find(line.indent)
        if block is None and (not self._blocks or measure(line.indent) > self._blocks[-1].width):
            block = self._open(line.indent, is_declared=False, is_tap=True)
        if block is None or block.plan is not None:
            self.keep(line)
            return
        block.plan, block.skipped = plan.count, plan.skipped
        self._subtest = ""

    def _take_result(self, line: Line, result: ResultLine, *, is_last: bool) -> None:
        block = self._find(line.indent) or self._imply(line, result)
        number = result.number
        if block is None or (number is None and not block.is_tap):
            self.keep(line)
            return
        # A line that broke off may lack digits of its number.
        if is_last and number is not None and number != block.last + 1:
            self.keep(line)
            return
        running = ""
        if result.verdict in BAD:
            # The program ended, and one of its tests was the last.
            running = f"{NO_RESULT}: {result.brief}" if result.brief else NO_RESULT
        while self._blocks[-1] is not block:
            self._fold(running)
        self._finish(block, result, block.last + 1 if number is None else number)
        self._subtest = ""

    def _take_name(self, line: Line, name: str) -> None:
        self.keep(line)
        block = self._find(line.indent[: line.indent.rindex("#")])
        if block is not None and not block.reported:
            block.name = name
        self._subtest = name

    def _take_start(self, line: Line, name: str) -> None:
        self.keep(line)
        if not self._blocks:
            return
        block = self._blocks[-1]
        if name.startswith(HEADING):
            # A remark of kselftest's runner, which is the block around the program's own.
            block = self._find(line.indent[: line.indent.rindex("#")]) or block
        if block.left or (block.plan is None and "#" in line.indent):
            block.started = name

    def _find(self, indent: str) -> Block | None:
        """Returns the open block of exactly this indentation."""
        if self._blocks and self._blocks[-1].indent == indent:
            return self._blocks[-1]
        width = measure(indent)
        for block in reversed(self._blocks):
            if block.width == width and (block.indent == indent or "#" not in indent + block.indent):
                return block
        return None

    def _imply(self, line: Line, result: ResultLine) -> Block | None:
        """Returns a new block for a result outside of all: its version line is missing, or the log lost its start."""
        if result.number is None:
            return None
        if "#" in line.indent:
            # Under an older runner of kselftest, programs print no version line, and some no plan.
            around = self._blocks[-1] if self._blocks else None
            is_program = around is not None and around.started.startswith(HEADING) and result.number == 1
            if not is_program or around is None or line.indent != f"{around.indent}# ":
                return None
            return self._open(line.indent, is_declared=False, is_tap=False)
        if not self._blocks or (measure(line.indent) > self._blocks[-1].width and result.number == 1):
            return self._open(line.indent, is_declared=False, is_tap=False)
        return None

    def _open(self, indent: str, *, is_declared: bool, is_tap: bool) -> Block | None:
        """Returns a new innermost block. None: there are too many."""
        if len(self._blocks) >= MAX_DEPTH:
            return None
        if not self._blocks and indent:
            # A log that has lost its start, or one of KUnit's files of results.
            self._blocks.append(Block("", is_declared=False, is_tap=False))
        self.has_found = self.has_found or is_declared
        block = Block(indent, is_declared=is_declared, is_tap=is_tap)
        block.name, self._subtest = self._subtest, ""
        self._blocks.append(block)
        return block

    def _fold(self, running: str) -> None:
        """Closes the innermost block: it has the subtests of the test that runs in the block around it."""
        child = self._blocks.pop()
        block = self._blocks[-1]
        if not child.is_declared and child.is_unused:
            # A line that looks like a plan.
            block.panic = child.panic if block.panic is None else block.panic
            for text in child.log:
                block.keep(text)
            return
        if block.has_child and child.name and block.child_name not in ("", child.name):
            # The result of the test before was lost.
            self._give_up(block, NO_RESULT)
        self._close(child, running)
        block.has_child = True
        block.subtests += child.leaves
        block.child_name = child.name or block.child_name
        block.cause = child.cause
        block.panic = child.panic if block.panic is None else block.panic
        for text in child.log:
            block.keep(text)

    def _close_outermost(self, running: str) -> None:
        block = self._blocks.pop()
        if block.is_unused and (not block.is_declared or (block.plan is None and not running)):
            # A line that looks like a plan; or a version line that another follows at once.
            return
        self._close(block, running)
        if not block.reported and not block.leaves:
            verdict, brief = CaseVerdict.ERROR, NO_TEST
            if block.skipped is not None:
                verdict, brief = CaseVerdict.SKIPPED, block.skipped
            self._add(block, block.name or "all tests", verdict, brief)
        self._loose += block.leaves

    def _finish(self, block: Block, result: ResultLine, number: int) -> None:
        """Takes the result of a test. One with subtests has no result of its own, unless it failed and none of them."""
        verdict, brief = result.verdict, result.brief
        if block.panic is not None:
            verdict, brief, block.panic = CaseVerdict.ERROR, _describe_panic(block.panic), None
        name = result.name[:MAX_NAME_CHARACTERS] or f"test {number}"
        has_bad = bool(block.subtests and self._adopt(block, name) & BAD)
        if not block.subtests or (verdict in BAD and not has_bad):
            self._latest = self._add(block, name, verdict, brief)
        elif block.log:
            block.take_log()
        block.has_bad = block.has_bad or has_bad or verdict in BAD
        block.count(number)
        block.has_own = self.has_found = True

    def _adopt(self, block: Block, name: str) -> set[CaseVerdict]:
        """Adds the subtests of a test to the block's results. Returns their verdicts. name: "" if unknown."""
        for leaf in block.subtests if name else ():
            leaf.parents.append(name)
        block.leaves += block.subtests
        return {leaf.verdict for leaf in block.subtests}

    def _close(self, block: Block, running: str) -> None:
        """Adds a result for each test that is missing. running: the words for the one that runs; "": none can run."""
        why = block.cause
        if block.panic is not None:
            why = _describe_panic(block.panic)
        elif block.bail_out is not None:
            why = f"bailed out: {block.bail_out}" if block.bail_out else "bailed out"
        cause = why if block.panic is not None else block.cause
        is_cut = block.panic is not None and (block.left > 0 or block.plan is None)
        is_at_end = block.plan is not None and block.last >= block.plan
        may_run = block.left > 0 and not is_at_end and (bool(running) or block.bail_out is not None)
        if block.has_child or block.started or is_cut or may_run:
            self._give_up(block, why or running or NO_RESULT)
        elif block.bail_out is not None and not block.has_bad:
            self._add(block, "Bail out!", CaseVerdict.ERROR, why)
        self._add_missing(block, f"{DID_NOT_RUN}: {why}" if why else DID_NOT_RUN)
        block.cause = cause

    def _give_up(self, block: Block, brief: str) -> None:
        """Adds an error for the test that runs, unless one of its subtests has it already."""
        # Nothing is known of a block that stands for a log's lost start, or for what is around KUnit's files.
        is_known = block.is_declared or block.plan is not None or block.has_own or not block.has_child
        name = block.next_name if is_known else block.child_name
        found = self._adopt(block, name)
        block.has_bad = block.has_bad or bool(found & BAD)
        if block.panic is not None or (is_known and CaseVerdict.ERROR not in found):
            self._add(block, block.next_name, CaseVerdict.ERROR, brief)
            block.has_bad = True
        block.panic = None
        block.count(block.last + 1)

    def _add_missing(self, block: Block, behind: str) -> None:
        top = block.last
        room = MAX_MISSING
        for first, last in block.find_missing():
            end = min(last, first + room - 1)
            room -= end - first + 1
            for number in range(first, end + 1):
                self._add(block, f"test {number}", CaseVerdict.ERROR, NO_RESULT if number < top else behind)
            if end < last:
                name = f"test {last}" if end + 1 == last else f"tests {end + 1} to {last}"
                self._add(block, name, CaseVerdict.ERROR, behind)
                return

    def _add(self, block: Block, name: str, verdict: CaseVerdict, brief: str) -> Leaf | None:
        """Adds a result, with the log since the one before. None: there are too many."""
        log = block.take_log() if block.log else None
        if not self._allowance.take_test():
            return None
        limit = MAX_PASSED_LOG_CHARACTERS if verdict is CaseVerdict.PASSED else MAX_LOG_CHARACTERS
        leaf = Leaf(name, verdict, brief[:MAX_NAME_CHARACTERS], self._allowance.take_log(log, limit) if log else "")
        block.leaves.append(leaf)
        return leaf


def _describe_panic(reason: str) -> str:
    return f"the guest's kernel panicked: {reason}"
