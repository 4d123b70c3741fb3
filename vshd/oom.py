"""Whom the kernel ends when memory runs out (proc(5), oom_score_adj).

The daemon is never chosen, and a session's own process only after everything else: it is small, and without it a client
loses a session that did no harm. A target has the score that vshd was started with, so that the largest program of a
user's is chosen first. Where the kernel does not let this process change its score, nothing changes.
"""

import os

# linux/oom.h: OOM_SCORE_ADJ_MIN. Such a process is not chosen at all.
NEVER = -1000
# Chosen when nothing else is left: a machine without any process to choose panics.
LAST = -900
SCORE_BYTES_MAX = 16


def take_shield() -> int | None:
    """Makes this process one that is never chosen. Its score before; None where that may not be."""
    score = _read()
    return score if score is not None and set_score("self", NEVER) else None


def set_score(pid: int | str, score: int) -> bool:
    """Whether process `pid` has this score now."""
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
