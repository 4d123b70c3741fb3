"""A second user of this host, for tests that run as root."""

import os
from collections.abc import Callable

SOMEBODY_ELSE = 65533


def ask_as_other(question: Callable[[], object]) -> str:
    """Runs `question` in a process of another user. Returns the repr of its answer, or "NAME: text" of its error.

    seteuid(2) in the process of the tests would not do: a process that has changed its user is not dumpable any more,
    and from then on root without CAP_SYS_PTRACE, as in a container, cannot look into its /proc/PID.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(SOMEBODY_ELSE, SOMEBODY_ELSE, SOMEBODY_ELSE)
            os.setresuid(SOMEBODY_ELSE, SOMEBODY_ELSE, SOMEBODY_ELSE)
            answer = repr(question())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = answers.read()
    os.waitpid(pid, 0)
    return text
