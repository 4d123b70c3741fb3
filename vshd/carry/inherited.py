"""What a process inherits from the program that started it, and must not rely on: signals and standard descriptors.

Service managers, CI agents and cron wrappers ignore SIGCHLD, block signals or close descriptors 0 to 2, and all they
start inherits that. With SIGCHLD ignored the kernel keeps no exit status, and a tool that failed looks like one that
succeeded. A blocked signal never arrives. With a standard descriptor closed the next file that is opened becomes stdin
or stderr. So every program of ours begins here.
"""

import _signal  # type: ignore[import-not-found]  # typeshed lacks it
import os

# Ignored on purpose, by a person (nohup, trap '' TERM) or by a shell for its background (`&`): a program that a person
# starts leaves these as they are.
OF_PEOPLE: tuple[int, ...] = (
    _signal.SIGHUP,
    _signal.SIGINT,
    _signal.SIGQUIT,
    _signal.SIGTERM,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
    _signal.SIGTSTP,
    _signal.SIGTTIN,
    _signal.SIGTTOU,
)
# Ignored by Python itself: a write then fails with an error of its own.
OF_PYTHON: tuple[int, ...] = (_signal.SIGPIPE, _signal.SIGXFSZ)


def settle_signals(kept: tuple[int, ...] = ()) -> None:
    """Blocks no signal, and ignores none but those of Python and, where they were ignored before, those of `kept`."""
    for number in _signal.valid_signals():
        if number not in kept and number not in OF_PYTHON and _signal.getsignal(number) == _signal.SIG_IGN:
            _signal.signal(number, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())


def hold_stdio() -> None:
    """Makes /dev/null of each standard descriptor that is closed: at its end at once, and taking all output."""
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
