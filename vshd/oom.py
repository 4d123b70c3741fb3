"""Sets which process the kernel ends first when memory runs out (proc(5), oom_score_adj).

The kernel never chooses the daemon, and a session's own process only after all others. Such a process is small, and
without it a client loses a session that did no harm. A target keeps the score that vshd was started with, so that the
kernel first chooses the largest program of a user. When the kernel does not let this process change its score, all
scores stay.
"""

import os

# linux/oom.h: OOM_SCORE_ADJ_MIN. Such a process is not chosen at all.
NEVER = -1000
# Chosen after all other processes: a machine without any process to choose panics.
LAST = -900
SCORE_BYTES_MAX = 16


class Shield:
    """The scores of the daemon and of the processes that serve its sessions.

    Invariant: a process is in `_exposed` or `_shielded` once the target of its session runs, and in neither before.
    """

    def __init__(self) -> None:
        # The score for targets; None: this process may not change scores.
        self._target_score: int | None = None
        self._exposed: set[int] = set()
        self._shielded: set[int] = set()

    def take(self) -> None:
        """Keeps the kernel from ever choosing this process."""
        score = _read()
        if score is not None and set_score("self", NEVER):
            self._target_score = score

    def drop(self) -> None:
        """Gives this process, a child of the daemon, the score that its target inherits."""
        if self._target_score is not None:
            set_score("self", self._target_score)

    def expect(self, pid: int) -> None:
        """The target of this process runs: from now on the process may get another score than its target."""
        if self._target_score is not None:
            self._exposed.add(pid)

    def cover(self) -> None:
        """Has the kernel choose the processes of sessions after all others. Not before their targets run, which would
        have inherited it; and not while a short command runs, which would wait for it.
        """
        while self._exposed:
            pid = self._exposed.pop()
            if set_score(pid, LAST):
                self._shielded.add(pid)

    def uncover(self, pid: int) -> bool:
        """Gives a process the score that its next target inherits; False: it kept another one."""
        is_shielded = pid in self._shielded
        self.forget(pid)
        return not is_shielded or self._target_score is None or set_score(pid, self._target_score)

    def forget(self, pid: int) -> None:
        """The session of this process is over."""
        self._exposed.discard(pid)
        self._shielded.discard(pid)


def set_score(pid: int | str, score: int) -> bool:
    """Sets the score of process `pid`; returns whether it has this score now."""
    try:
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, b"%d" % score)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _read() -> int | None:
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return int(os.read(fd, SCORE_BYTES_MAX))
    finally:
        os.close(fd)
