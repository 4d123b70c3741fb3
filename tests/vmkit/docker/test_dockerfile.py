"""The Dockerfile keeps step with the Makefile, the locks and the folders it copies."""

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]
DOCKERFILE = (CHECKOUT / "Dockerfile").read_text().replace("\\\n", " ")


def packages_of(name: str) -> set[str]:
    found = re.search(rf"^{name} := (.*)$", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return set(found[1].split())


def installed() -> set[str]:
    lines = re.findall(r"^RUN \S+/install (.*)$", DOCKERFILE, re.MULTILINE)
    return set(lines[0].split())


def test_first_stage_installs_what_make_installs() -> None:
    assert packages_of("PACKAGES") <= installed()


def test_build_backend_of_the_run_stage_is_in_its_lock() -> None:
    assert "hatchling==" in (CHECKOUT / "requirements/run.lock").read_text()


def test_context_has_all_that_is_copied() -> None:
    ignored = (CHECKOUT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    for words in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for source in words.split()[:-1]:
            assert (CHECKOUT / source).exists(), source
            assert source == "." or f"!{source.split('/')[0]}" in ignored, source


def test_any_builder_will_do() -> None:
    """The classic builder knows neither mounts nor heredocs nor a syntax line."""
    assert "# syntax=" not in DOCKERFILE
    assert not re.search(r"RUN --|COPY --(?!from|chown)|<<", DOCKERFILE)
