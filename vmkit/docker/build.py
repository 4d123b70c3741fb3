"""Builds the project's Docker image. Turns the engine's stream of lines into progress, and a failure into an error."""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.docker.context import find_files, write_context
from vmkit.docker.engine import FULL_DISK, explain_refusal
from vmkit.errors import BuildError, ConfigError

if TYPE_CHECKING:
    from docker import APIClient

REPOSITORY = "vmkit"
TARGETS = ("run", "test")
# Enough of a failed step's output to see the cause.
TAIL_LINES = 20
# A package's download on a slow line is silent for long; the engine itself has no deadline.
SILENCE_S = 1800

_STEP = re.compile(r"Step (\d+)/(\d+) : (.*)")
# What a step wrote to stderr the engine shows in red.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NO_NETWORK = re.compile(r"Temporary failure (?:resolving|in name resolution)|Could not resolve|Network is unreachable")
_OWN = re.compile(r"vmkit-docker: (error|hint): (.*)")
Tell = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """The options of a build. Empty text leaves the choice to the Dockerfile or the engine."""

    context: Path
    target: str
    tag: str
    base: str = ""
    network: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False


def tag_of(target: str) -> str:
    """Returns the default name of a stage's image."""
    return f"{REPOSITORY}:latest" if target == "run" else f"{REPOSITORY}:{target}"


def build_docker_image(engine: "APIClient", spec: BuildSpec, tell: Tell, log: Callable[[str], None]) -> str:
    """Builds the image and returns its id. log gets every line of the build's output."""
    with tempfile.TemporaryFile(prefix="vmkit-context-") as archive:
        size = write_context(spec.context, find_files(spec.context), archive)
        tell(f"sending {size / 1e6:.1f} MB to the engine", None)
        archive.seek(0)
        stream = engine.build(
            fileobj=archive,
            custom_context=True,
            tag=spec.tag,
            target=spec.target,
            buildargs={**({"BASE": spec.base} if spec.base else {}), **spec.arguments},
            network_mode=spec.network or None,
            nocache=spec.fresh,
            rm=True,
            # What a failed or interrupted build leaves is removed, too.
            forcerm=True,
            decode=True,
            timeout=SILENCE_S,
        )
        return follow_build(stream, tell, log)


def follow_build(stream: Iterable[Mapping[str, object]], tell: Tell, log: Callable[[str], None]) -> str:
    """Reads the engine's messages to the end. Raises BuildError on a report of failure, or without one of success."""
    step, image = "", ""
    tail: list[str] = []
    for message in stream:
        for line in _COLOUR.sub("", str(message.get("stream", ""))).splitlines():
            found = _STEP.match(line)
            if found:
                step, tail = line, []
                tell(found[3], (int(found[1]) - 1) / int(found[2]))
            if line.strip():
                log(line)
                tail = [*tail, line][-TAIL_LINES:]
        if "error" in message:
            raise _explain_failure(str(message["error"]), step, tail)
        aux = message.get("aux")
        if isinstance(aux, Mapping) and "ID" in aux:
            image = str(aux["ID"])
    if not image:
        raise BuildError(
            "the engine ended the build without a message",
            details="\n".join(tail),
            hint="see whether it still runs: docker info",
        )
    return image


def _explain_failure(text: str, step: str, tail: list[str]) -> ConfigError | BuildError:
    """Returns an error with the Dockerfile's own message, if any; else with the failed step and its output."""
    own = {found[1]: found[2] for line in tail if (found := _OWN.match(line))}
    if "error" in own:
        kind = ConfigError if "base image" in own["error"] else BuildError
        return kind(f"the image cannot be built: {own['error']}", hint=own.get("hint", ""))
    if FULL_DISK in f"{text}\n{' '.join(tail)}".lower():
        return BuildError("the engine's disk is full", details=text, hint="make room: docker system prune")
    if any(_NO_NETWORK.search(line) for line in tail):
        return BuildError(
            f"the build has no network: {step}",
            details="\n".join([*tail, text]),
            hint="use the host's network: vmkit docker build --network host",
        )
    refusal = explain_refusal(text)
    if step.startswith("Step") and " : FROM" in step and not refusal.hint.startswith("see the engine"):
        return (
            refusal if isinstance(refusal, ConfigError | BuildError) else BuildError(refusal.brief, hint=refusal.hint)
        )
    return BuildError(
        f"the build failed at {step or 'its start'}",
        details="\n".join([*tail, text]),
        hint="mend the cause and build again: the engine keeps the steps before it",
    )
