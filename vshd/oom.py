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


def take_shield() -> int | None:
    """Keeps the kernel from ever choosing this process. Returns its score before; None: it may not change it."""
    score = _read()
    return score if score is not None and set_score("self", NEVER) else None


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
