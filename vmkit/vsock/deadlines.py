"""Waits that must end: links of one kind share one time-out, so the order of arrival is the order of expiry."""

from vmkit.vsock.link import Link


class Deadlines:
    """Links that wait for one kind of thing. Invariant: insertion order is deadline order, because a dict keeps it."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._entries: dict[Link, float] = {}

    def add(self, link: Link, now_s: float) -> None:
        """The wait begins, or begins anew."""
        self._entries.pop(link, None)
        self._entries[link] = now_s + self.timeout_s

    def discard(self, link: Link) -> None:
        """The wait is over, if there was one."""
        self._entries.pop(link, None)

    def clear(self) -> None:
        """Nobody waits any more."""
        self._entries.clear()

    def __contains__(self, link: Link) -> bool:
        return link in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def first(self) -> Link:
        """Who waits longest; there is somebody."""
        return next(iter(self._entries))

    def links(self) -> list[Link]:
        """Who waits."""
        return list(self._entries)

    def take_expired(self, now_s: float) -> list[Link]:
        """Removes and returns those whose time is up."""
        expired = []
        for link, deadline_s in self._entries.items():
            if deadline_s > now_s:
                break
            expired.append(link)
        for link in expired:
            del self._entries[link]
        return expired

    def find_next_s(self) -> float | None:
        """When the first wait expires."""
        return next(iter(self._entries.values()), None)
