"""What the suite counts: attempts by scene, and the intrusions among them; printed at the end of the run."""

from dataclasses import dataclass, field


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

    def render(self) -> list[str]:
        """One line for each place and the sum of the guarded ones; empty when nothing was tried."""
        if not self.entries:
            return []
        width = max(map(len, self.entries))
        guarded = [entry for entry in self.entries.values() if entry.is_guarded]
        attempts, intrusions = (sum(getattr(entry, name) for entry in guarded) for name in ("attempts", "intrusions"))
        lines = [entry.render(width) for entry in self.entries.values()]
        return [*lines, f"with all layers on: {attempts:,} attempts, {intrusions} intrusions by anyone but guest root"]


LEDGER = Ledger()
