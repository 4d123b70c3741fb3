"""What the suite counts: attempts by scene, and the intrusions among them; printed at the end of the run."""

from dataclasses import dataclass, field

from tests.guest.wall.expected import is_intrusion
from tests.guest.wall.scene import Outcome


@dataclass
class Entry:
    """Attempts at one place. by_root: attempts of guest root that got through, which no layer claims to stop."""

    where: str
    is_guarded: bool
    attempts: int = 0
    intrusions: int = 0
    by_root: int = 0

    def render(self, width: int) -> str:
        root = f"  ({self.by_root} more by root of the guest, which is not defended)" if self.by_root else ""
        return f"{self.where:{width}}  {self.attempts:6,} attempts  {self.intrusions:4} intrusions{root}"


@dataclass
class Ledger:
    """One run's entries, by place."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, where: str, attempts: int, intrusions: int = 0, by_root: int = 0, *, is_guarded: bool = True) -> None:
        """is_guarded: every layer is on there, so that no intrusion is expected."""
        entry = self.entries.setdefault(where, Entry(where, is_guarded))
        entry.attempts += attempts
        entry.intrusions += intrusions
        entry.by_root += by_root

    def enter(self, where: str, outcomes: list[Outcome], *, is_guarded: bool) -> None:
        """A whole attack."""
        by_root = sum(outcome.who == "root" and outcome.result in ("served", "connected") for outcome in outcomes)
        self.add(where, len(outcomes), sum(map(is_intrusion, outcomes)), by_root, is_guarded=is_guarded)

    def render(self) -> list[str]:
        """One line for each place and the sum of the guarded ones; empty when nothing was tried."""
        if not self.entries:
            return []
        width = max(map(len, self.entries))
        guarded = [entry for entry in self.entries.values() if entry.is_guarded]
        attempts, intrusions = (sum(getattr(entry, name) for entry in guarded) for name in ("attempts", "intrusions"))
        lines = [entry.render(width) for entry in self.entries.values()]
        return [*lines, f"with all layers on: {attempts:,} attempts, {intrusions} intrusions by anyone but guest root"]

    def read_table(self, text: str) -> None:
        """Takes over the rows of an earlier page, for places where this run was not."""
        earlier = dict[str, Entry]()
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == len(COLUMNS) and cells[1] in (YES, NO):
                attempts, intrusions, by_root = (int(cell.replace(",", "")) for cell in cells[2:])
                earlier[cells[0]] = Entry(cells[0], cells[1] == YES, attempts, intrusions, by_root)
        self.entries = earlier | self.entries

    def render_table(self) -> str:
        """The same as a Markdown page."""
        lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        lines += [
            f"| {e.where} | {YES if e.is_guarded else NO} | {e.attempts:,} | {e.intrusions} | {e.by_root} |"
            for e in self.entries.values()
        ]
        return f"{TABLE_HEAD}\n" + "\n".join(lines) + f"\n\n{self.render()[-1]}.\n"


COLUMNS = ("where", "all layers", "attempts", "intrusions", "more by root of the guest")
YES, NO = "yes", "no"
TABLE_HEAD = """# The wall, in full

`make wall-full` makes this page. It has every attempt of the adversary suite
([security](security.md)), by image, kernel, backend and layers. With layers missing there must be
intrusions. With all layers there must be none. The wall does not defend a guest against its own
root, so those intrusions are counted apart.

A run of a part (`make wall-full PYTEST_ARGS='-k debian-6.1-vhost'`) renews the rows of that part.
`tests/guest/wall/expected.py` lists the result that each attempt must have. A run fails where
another result is seen.
"""

LEDGER = Ledger()
