"""The workflows, ours and those of examples: their form, that ours do what .ci/run does, and their shell steps.

actionlint has read them, too; its package fetches a program when it is installed, so no test depends on it.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[1]
# Ours, and the one that the tutorial gives to its readers.
WORKFLOWS = sorted([*CHECKOUT.glob(".github/workflows/*.yml"), *CHECKOUT.glob("examples/*/.github/workflows/*.yml")])
IDS = [path.name for path in WORKFLOWS]
DEADLINE_S = 60
# docs.github.com, "Workflow syntax for GitHub Actions".
WORKFLOW_KEYS = {"name", "run-name", "on", "permissions", "env", "defaults", "concurrency", "jobs"}
JOB_KEYS = {
    *(
        "name",
        "permissions",
        "needs",
        "if",
        "runs-on",
        "environment",
        "concurrency",
        "outputs",
        "env",
        "defaults",
        "steps",
    ),
    *("timeout-minutes", "strategy", "continue-on-error", "container", "services", "uses", "with", "secrets"),
}
STEP_KEYS = {
    *("id", "if", "name", "uses", "run", "working-directory", "shell", "with", "env", "continue-on-error"),
    "timeout-minutes",
}
CONTEXTS = {"github", "env", "vars", "job", "steps", "runner", "secrets", "strategy", "matrix", "needs", "inputs"}


def load(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as true; BaseLoader reads text as text.
    loaded = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    assert isinstance(loaded, dict)
    return loaded


def jobs_of(path: Path) -> dict[str, dict[str, Any]]:
    jobs: dict[str, dict[str, Any]] = load(path)["jobs"]
    return jobs


STEPS = [
    pytest.param(step["run"], id=f"{path.stem}-{job}-{step.get('name', index)}")
    for path in WORKFLOWS
    for job, body in jobs_of(path).items()
    for index, step in enumerate(body["steps"])
    if "run" in step
]


@pytest.mark.parametrize("path", WORKFLOWS, ids=IDS)
def test_keys_are_those_of_the_syntax(path: Path) -> None:
    workflow = load(path)
    assert set(workflow) <= WORKFLOW_KEYS and {"on", "jobs", "permissions"} <= set(workflow)
    for name, job in workflow["jobs"].items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name)
        assert set(job) <= JOB_KEYS and {"runs-on", "steps", "timeout-minutes"} <= set(job)
        assert set(job.get("needs", ())) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert set(step) <= STEP_KEYS
            assert ("run" in step) != ("uses" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=IDS)
def test_actions_have_a_version(path: Path) -> None:
    actions = [step["uses"] for job in jobs_of(path).values() for step in job["steps"] if "uses" in step]
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@(v\d+|[0-9a-f]{40})", action)


def test_expressions_name_contexts_that_exist() -> None:
    expressions = [found for path in WORKFLOWS for found in re.findall(r"\$\{\{(.*?)\}\}", path.read_text())]
    contexts = {found for expression in expressions for found in re.findall(r"(?<![\w.'])([a-z]+)\.", expression)}
    assert "github" in contexts
    assert contexts <= CONTEXTS


@pytest.mark.parametrize("path", WORKFLOWS, ids=IDS)
def test_every_job_keeps_evidence_of_a_failure(path: Path) -> None:
    for job in jobs_of(path).values():
        last = job["steps"][-1]
        assert last["uses"].startswith("actions/upload-artifact@")
        assert last["if"] in ("failure()", "always()")


def test_ci_does_what_the_run_script_does() -> None:
    script = set(re.findall(r"^make (\w+)", (CHECKOUT / ".ci/run").read_text(), re.MULTILINE))
    steps = " ".join(
        step["run"]
        for job in jobs_of(CHECKOUT / ".github/workflows/ci.yml").values()
        for step in job["steps"]
        if "run" in step
    )
    assert set(re.findall(r"\bmake (\w+)", steps)) == script


@pytest.mark.parametrize("script", STEPS)
def test_shell_steps_run(script: str, tmp_path: Path) -> None:
    """With `bash -e`, as a runner's default is; what changes the machine, or takes long, is a script that says yes."""
    called = tmp_path / "called"
    for name in ("sudo", "make", "pipx", ".venv/bin/vmkit", "ci/vm-test"):
        fake = tmp_path / name
        fake.parent.mkdir(parents=True, exist_ok=True)
        fake.write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >> {called}\n')
        fake.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=environ, capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert called.exists() or done.stdout
    for target in re.findall(r"^make (\w+)", called.read_text() if called.exists() else "", re.MULTILINE):
        assert re.search(rf"^{target}:", (CHECKOUT / "Makefile").read_text(), re.MULTILINE), target


def test_gitlab_job_of_the_example_runs_its_script(tmp_path: Path) -> None:
    """As a runner does: all lines in one shell that stops at the first failure."""
    job = load(CHECKOUT / "examples/ci-job/.gitlab-ci.yml")["vm-test"]
    assert set(job) <= {"image", "variables", "timeout", "before_script", "script", "cache", "artifacts"}
    called = tmp_path / "called"
    for name in ("apt-get", "pipx", "ci/vm-test"):
        fake = tmp_path / name
        fake.parent.mkdir(parents=True, exist_ok=True)
        fake.write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >> {called}\n')
        fake.chmod(0o755)
    environ = {**os.environ, **job["variables"], "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = "\n".join([*job["before_script"], *job["script"]])
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=environ, capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = called.read_text().splitlines()
    source = "{VMKIT_SOURCE}@{VMKIT_VERSION}".format(**job["variables"])
    assert lines[-2:] == [f"pipx install {source}", "vm-test "]
