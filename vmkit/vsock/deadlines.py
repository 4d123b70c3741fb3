"""Waits with deadlines: links of one kind share one time-out, so the order of arrival is the order of expiry."""

from vmkit.vsock.link import Link


class Deadlines(dict[Link, float]):
    """Links that wait for one kind of thing, each with its deadline.

    Invariant: insertion order is deadline order. A dict keeps the order, and asking an empty one costs next to nothing.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self.timeout_s = timeout_s

    def add(self, link: Link, now_s: float) -> None:
        """Begins the link's wait, or begins it anew."""
        self.pop(link, None)
        self[link] = now_s + self.timeout_s

    def discard(self, link: Link) -> None:
        """Ends the link's wait, if it has one."""
        self.pop(link, None)

    def first(self) -> Link:
        """Returns the link that waits longest. The caller has checked that one waits."""
        return next(iter(self))

    def next_s(self) -> float:
        """Returns when the first wait expires. The caller has checked that one waits."""
        return next(iter(self.values()))

    def take_expired(self, now_s: float) -> list[Link]:
        """Removes and returns the links whose time is up."""
        expired = []
        for link, deadline_s in self.items():
            if deadline_s > now_s:
                break
            expired.append(link)
        for link in expired:
            del self[link]
        return expired
