"""Which command `vmkit run` runs: the settings of a container image and the words of a user become one. Pure.

The rules are docker's (docs.docker.com, "Running containers"; moby, runconfig): words take the place of Cmd, and come
behind Entrypoint. --entrypoint takes the place of both.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from vmkit.errors import ConfigError
from vmkit.oneshot.variables import Assignment, merge
from vmkit.roots.settings import ContainerSettings


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks for. words: the command. entrypoint: None: the image's. Empty texts: the image's, too.

    has_stdin: the command reads this program's stdin. has_terminal: it has a terminal.
    """

    words: tuple[str, ...] = ()
    entrypoint: str | None = None
    assignments: tuple[Assignment, ...] = ()
    working_dir: str = ""
    user: str = ""
    has_stdin: bool = False
    has_terminal: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """What runs. argv: empty for the login shell of the user. working_dir: empty for the user's home."""

    argv: tuple[str, ...]
    env: dict[str, str]
    working_dir: str
    user: str

    def make_settings(self) -> ContainerSettings:
        """The same as a container's configuration, which other sessions of the machine have, too."""
        words = tuple(f"{name}={value}" for name, value in self.env.items())
        return ContainerSettings(words, self.working_dir, self.user, (), self.argv)


def plan_command(image: ContainerSettings | None, wishes: Wishes, source: str, *, has_shell: bool) -> Command:
    """The command of an image and a user's wishes. image: None for a root that is no container image.

    source: what the user gave as SOURCE. has_shell: without any word, the login shell runs. Raises ConfigError.
    """
    settings = image or ContainerSettings()
    argv = _find_argv(settings, wishes)
    if not argv and not has_shell:
        what = "the image names no command" if image is not None else "this root names no command"
        raise ConfigError(f"{what} to run: {source}", hint=f"give one: vmkit run {shlex.quote(source)} COMMAND")
    if wishes.working_dir and not wishes.working_dir.startswith("/"):
        raise ConfigError(f"--workdir must be an absolute path, not '{wishes.working_dir}'")
    return Command(
        argv=argv,
        env=merge(settings.env, wishes.assignments),
        working_dir=wishes.working_dir or settings.working_dir,
        user=wishes.user or settings.user,
    )


def _find_argv(image: ContainerSettings, wishes: Wishes) -> tuple[str, ...]:
    if wishes.entrypoint is not None:
        # Cmd is made for the image's own entry point.
        return (*filter(None, (wishes.entrypoint,)), *wishes.words)
    return (*image.entrypoint, *(wishes.words or image.cmd))


def take_words(words: Sequence[str]) -> tuple[str, ...]:
    """The words behind SOURCE, without a -- before them."""
    return tuple(words[1:] if list(words[:1]) == ["--"] else words)
