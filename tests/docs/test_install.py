"""docs/howto/install.md names what the programs need, print and leave."""

import re
import tomllib

from tests.docs.pages import CHECKOUT
from vmkit.cli.completion import SHELLS
from vmkit.machine.doctor import Level
from vshd.wire.version import __version__

TEXT = (CHECKOUT / "docs/howto/install.md").read_text()
# On every Debian that can install packages over HTTPS.
EVERYWHERE = {"ca-certificates"}


def test_packages_are_those_of_make_up() -> None:
    packages = re.findall(r"^PACKAGES := (.+)$", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)[0].split()
    rows = " ".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `"))
    assert set(packages) - EVERYWHERE <= set(re.findall(r"`([\w.-]+)`", rows))


def test_python_version_is_the_one_of_the_project() -> None:
    needed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"Python {needed.removeprefix('>=')} or later" in TEXT


def test_wheel_has_the_name_that_a_build_gives_it() -> None:
    assert f"\nvmkit_vsh-{__version__}-py3-none-any.whl\n" in TEXT


def test_words_and_verdict_of_doctor_are_explained() -> None:
    for level in Level:
        assert f"| `{level.value}` |" in TEXT or f"| `{level.value.upper()}` |" in TEXT
    verdict = TEXT.partition("$ vmkit doctor\n")[2].partition("\n```")[0].splitlines()[-1]
    assert f'"{verdict}"' in (CHECKOUT / "vmkit/cli/doctor.py").read_text()


def test_completion_is_shown_for_every_shell_and_both_programs() -> None:
    for shell in SHELLS:
        assert f"vmkit completion {shell}" in TEXT and f"vsh --completion={shell}" in TEXT


def test_folders_that_stay_are_those_of_the_reference() -> None:
    reference = (CHECKOUT / "docs/reference/files.md").read_text()
    uninstall = TEXT.partition("## Uninstall")[2]
    for folder in re.findall(r"`(~/\.[\w./-]+|/(?:run/user|tmp)[\w/-]+)`", uninstall):
        assert folder == "~/.config/vsh" or folder in reference, folder
    assert uninstall.count("| `") >= 4
