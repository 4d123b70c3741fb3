"""The examples on real machines: each does what its README promises."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

import vmkit as vmkit_package
from tests.docs.pages import CHECKOUT
from tests.guest.conftest import BIN, DEADLINE_S, Run

EXAMPLES = CHECKOUT / "examples"

pytestmark = pytest.mark.usefixtures("own_registry")


def run(*words: object, folder: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environ}
    argv = [str(word) for word in words]
    return subprocess.run(
        argv,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_every_example_is_in_the_table_and_is_tested() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    table = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    assert folders
    for name in folders:
        assert f"({name}/README.md)" in table
        assert f'"{name}' in tests, f"no test runs the example {name}"


def test_ci_job_passes_and_its_status_is_that_of_the_tests(tmp_path: Path) -> None:
    """The tutorial breaks the program; here it is whole."""
    project = shutil.copytree(EXAMPLES / "ci-job", tmp_path / "project")
    done = run("ci/vm-test", folder=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok - ") == 3


def test_suite_of_pytest_has_a_fresh_machine_for_each_test(tmp_path: Path) -> None:
    project = shutil.copytree(EXAMPLES / "pytest-suite", tmp_path / "project")
    done = run("pytest", "-q", "-p", "no:cacheprovider", folder=project)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_stream_follows_the_server(tmp_path: Path) -> None:
    done = run(EXAMPLES / "stream/stream.py", folder=tmp_path)
    shown = (EXAMPLES / "stream/README.md").read_text().partition("$ ./stream.py\n")[2].partition("```")[0]
    assert done.stdout == shown, done.stderr


def test_matrix_runs_the_tests_under_two_kernels(tmp_path: Path) -> None:
    report = tmp_path / "results.xml"
    done = run("vmkit", "matrix", EXAMPLES / "kernel-matrix/lab.toml", "--junit", report, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (suite,) = Xml.parse(report).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("8", "0", "0")
    kernels = {str(case[0].text).strip()[:4] for case in suite if case.get("name") == "kernel"}
    assert len(kernels) == 2, kernels


def test_own_image_has_what_the_recipe_names(vsh: Run, tmp_path: Path) -> None:
    done = run("vmkit", "up", EXAMPLES / "own-image/lab.toml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"ls made " in vsh("--", "count-calls", "ls").stdout
    assert vsh("--user", "user", "--", "cat", "/srv/data/note").stdout == b"made at boot\n"


def test_web_server_answers_on_a_port_of_the_host(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = run(EXAMPLES / "web-server/serve", port, folder=tmp_path)
    assert f"open http://localhost:{port}/\n" in done.stdout, done.stderr
    page = run("curl", "-s", f"http://localhost:{port}/", folder=tmp_path)
    assert page.stdout == (EXAMPLES / "web-server/index.html").read_text()


PROGRAMS = {
    "sum.py": ("print(6 * 7)", "passed"),
    "endless.py": ("while True: pass", "too slow"),
    "flood.py": ("while True: print('x' * 1000)", "stopped"),
    "greedy.py": ("memory = [0] * 10**9", "status 1"),
    "network.py": ("import socket; socket.create_connection(('192.0.2.1', 80), 2)", "status 1"),
    "crash.py": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
}


@pytest.mark.slow
def test_untrusted_programs_are_judged(tmp_path: Path) -> None:
    for name, (code, _) in PROGRAMS.items():
        (tmp_path / name).write_text(f"{code}\n")
    done = run(EXAMPLES / "untrusted/judge.py", *PROGRAMS, folder=tmp_path)
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert {verdict["program"]: verdict["verdict"] for verdict in verdicts} == {
        name: verdict for name, (_, verdict) in PROGRAMS.items()
    }, done.stderr
    assert done.returncode == 1


def git(folder: Path, *words: str) -> str:
    identity = {"HOME": str(folder), "EMAIL": "test@example.org", "GIT_AUTHOR_NAME": "t", "GIT_COMMITTER_NAME": "t"}
    done = run("git", *words, folder=folder, **identity)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_bisect_finds_the_commit_that_broke_the_kernel(tmp_path: Path) -> None:
    """The "kernel tree" holds a word that the build writes into tiny's kernel, in the place of its version's."""
    kernel = vmkit_package.build("tiny").kernel
    assert b" SMP PREEMPT_DYNAMIC Debian " in kernel.read_bytes()
    tree = tmp_path / "tree"
    tree.mkdir()
    git(tree, "init", "-q")
    (tree / ".gitignore").write_text("vmlinux\n.gitconfig\n")
    # A word of six letters, as Debian; none makes the build fail.
    for number, word in enumerate(["Debian", "Ubuntu", "", "Fedora", "BROKEN", "BROKEN"], 1):
        (tree / "word").write_text(word)
        (tree / "count").write_text(str(number))
        git(tree, "add", ".")
        git(tree, "commit", "-q", "-m", f"commit {number}")
    (tree / "build").write_text(
        f'#!/bin/sh\ntest -s word && LC_ALL=C sed "s/_DYNAMIC Debian /_DYNAMIC $(cat word) /" {kernel} > vmlinux\n'
    )
    (tree / "build").chmod(0o755)
    git(tree, "bisect", "start", "HEAD", "HEAD~5")
    step = [EXAMPLES / "kernel-bisect/bisect_step.py", "--build", "./build", "--kernel", "vmlinux"]
    log = git(tree, "bisect", "run", *map(str, step), "--", "sh", "-c", "! uname -v | grep BROKEN")
    assert "commit 5" in log.partition("is the first bad commit")[2], log
    assert "good\n" in log and "bad: status 1\n" in log


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--no-such-option", "--", "true"], "--no-such-option"),
        (["--build", "true", "--kernel", "missing", "--", "true"], "missing"),
    ],
)
def test_bisect_stops_where_the_commit_is_not_at_fault(words: list[str], why: str, tmp_path: Path) -> None:
    """To git, 1 to 124 mean that the commit is bad."""
    done = run(EXAMPLES / "kernel-bisect/bisect_step.py", *words, folder=tmp_path)
    assert done.returncode == 255
    assert done.stderr.startswith("abort: ")
    assert why in done.stderr
