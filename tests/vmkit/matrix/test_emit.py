"""A matrix for Slurm and Kubernetes: the script with programs of those names, the manifests against their schemas."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from vmkit.errors import ConfigError
from vmkit.matrix.emit.batch import START_LIMIT_S, Batch, plan_batch
from vmkit.matrix.emit.kubernetes import ClusterChoice, render_kubernetes
from vmkit.matrix.emit.slurm import render_slurm
from vmkit.matrix.plan import Matrix, plan_matrix

# The release in which backoffLimitPerIndex became stable, and the newest that the package knows.
KUBERNETES = ("1.33", "1.37")
SIX = {
    "images": ["tiny", "debian", "bench"],
    "backends": ["user", "vhost"],
    "memory": "512M",
    "cpus": 2,
    "timeout": 90,
    "commands": {"kernel": "uname -r", "true": "true"},
}
CHOICE = ClusterChoice("registry.example/vmkit:1", "results", 4, None, "images = []\n")


@pytest.fixture
def six() -> Matrix:
    return plan_matrix(SIX, Path("lab.toml"))


@pytest.fixture
def batch(six: Matrix) -> Batch:
    return plan_batch(six, "lab.toml", "out")


class TestBatch:
    def test_task_is_a_cell_with_room_for_the_machine(self, batch: Batch) -> None:
        assert (batch.count, batch.is_sharded, batch.cpus) == (6, False, 2)
        assert batch.memory_mib > 512
        assert batch.limit_s == 2 * 90 + START_LIMIT_S

    def test_shard_has_the_time_of_its_cells(self, six: Matrix) -> None:
        batch = plan_batch(six, "lab.toml", "out", shards=4)
        assert (batch.count, batch.is_sharded) == (4, True)
        assert batch.limit_s == 2 * (2 * 90 + START_LIMIT_S)

    def test_more_shards_than_cells_are_refused(self, six: Matrix) -> None:
        with pytest.raises(ConfigError, match="--shards must be at most 6, the number of cells, not 7"):
            plan_batch(six, "lab.toml", "out", shards=7)

    @pytest.mark.parametrize("path", ["a\nb", "a\x1bb"])
    def test_path_that_would_end_a_comment_is_refused(self, six: Matrix, path: str) -> None:
        with pytest.raises(ConfigError, match="printable"):
            plan_batch(six, path, "out")
        with pytest.raises(ConfigError, match="printable"):
            plan_batch(six, "lab.toml", path)

    @pytest.mark.parametrize(
        ("file", "name"),
        [("/a/Lab 7.toml", "vmkit-lab-7"), ("x" * 90, "vmkit-" + "x" * 50), ("--.toml", "vmkit"), ("ü.toml", "vmkit")],
    )
    def test_name_is_a_label(self, six: Matrix, file: str, name: str) -> None:
        assert plan_batch(six, file, "out").name == name


RECORD = """#!/bin/sh
n=$(ls "$LOG" | wc -l)
printf '%s\\n' "$0" "$@" > "$LOG/$n.argv"
case $0 in */sbatch) cat > "$LOG/$n.stdin"; echo "77$n;cluster";; */vmkit) exit $STATUS;; esac
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that note how they were called, and the folder of these notes."""
    for name in ("sbatch", "scontrol", "vmkit"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(RECORD)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def run_sh(script: str, *args: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", "-s", "--", *args],
        input=script,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={**os.environ, **environ},
    )


class TestSlurm:
    def test_script_submits_the_array_and_the_merge_behind_it(self, batch: Batch, slurm: Path, tmp_path: Path) -> None:
        done = run_sh(render_slurm(replace(batch, results=str(tmp_path / "a 100%"))), "--partition=short")
        assert (done.returncode, done.stderr) == (0, "")
        assert "job 770 runs the cells; job 772 merges them" in done.stdout
        array = (slurm / "0.argv").read_text().splitlines()
        for option in ("--array=0-5", "--requeue", "--cpus-per-task=2", "--time=8", "--partition=short"):
            assert option in array
        assert f"--output={tmp_path}/a 100%%/slurm/%A_%a.log" in array
        merge = (slurm / "2.argv").read_text().splitlines()
        assert "--dependency=afterany:770" in merge
        assert "--partition=short" in merge
        assert (tmp_path / "a 100%" / "slurm").is_dir()

    @pytest.mark.parametrize(
        ("status", "restarts", "requeues"),
        [
            (0, 0, False),
            (1, 0, False),
            (64, 0, False),
            (124, 0, False),
            (125, 0, True),
            (137, 1, True),
            (125, 2, False),
        ],
    )
    def test_task_goes_back_into_the_queue_for_the_machine_s_sake_alone(
        self, batch: Batch, slurm: Path, tmp_path: Path, status: int, restarts: int, requeues: bool
    ) -> None:
        run_sh(render_slurm(replace(batch, results=str(tmp_path / "it's"))))
        cell = (slurm / "0.stdin").read_text()
        for note in slurm.iterdir():
            note.unlink()
        done = run_sh(
            cell,
            STATUS=str(status),
            SLURM_ARRAY_JOB_ID="40",
            SLURM_ARRAY_TASK_ID="3",
            SLURM_RESTART_COUNT=str(restarts),
        )
        assert done.returncode == status
        called = [note.read_text().splitlines() for note in sorted(slurm.iterdir())]
        assert called[0][1:] == ["matrix", "run", "lab.toml", "--cell", "3", "--to", str(tmp_path / "it's")]
        assert [call[1:] for call in called[1:]] == ([["requeue", "40_3"]] if requeues else [])

    def test_shard_chooses_its_number_by_itself(self, six: Matrix) -> None:
        script = render_slurm(plan_batch(six, "lab.toml", "out", shards=2))
        assert "--array=0-1" in script
        # One machine at a time, for which the task has memory, whatever processors the node has.
        assert "--shard auto/2 --jobs 1 --retry-machine-failures 2 --to" in script
        once = render_slurm(plan_batch(six, "lab.toml", "out", shards=2, retries=0))
        assert "--shard auto/2 --jobs 1 --to" in once


def read_manifests(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


class TestKubernetes:
    @pytest.mark.parametrize("version", KUBERNETES)
    @pytest.mark.parametrize("kvm", [None, "devices.kubevirt.io/kvm"])
    @pytest.mark.parametrize("text", ["images = []\n", None])
    def test_manifests_fit_the_official_schemas(
        self, batch: Batch, version: str, kvm: str | None, text: str | None
    ) -> None:
        manifests = read_manifests(render_kubernetes(batch, replace(CHOICE, kvm_resource=kvm, matrix_text=text)))
        kinds = [manifest["kind"] for manifest in manifests]
        assert kinds == (["ConfigMap"] if text is not None else []) + ["Job", "Job"]
        for manifest in manifests:
            kubernetes_validate.validate(manifest, version, strict=True)

    def test_index_is_repeated_for_the_machine_s_sake_alone(self, batch: Batch) -> None:
        job = read_manifests(render_kubernetes(batch, CHOICE))[1]["spec"]
        assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 6, 4)
        assert job["backoffLimitPerIndex"] == batch.retries
        codes = {
            code: rule["action"]
            for rule in job["podFailurePolicy"]["rules"]
            for code in rule.get("onExitCodes", {}).get("values", [])
        }
        assert codes == {1: "FailIndex", 124: "FailIndex", 64: "FailJob"}
        assert {"type": "DisruptionTarget", "status": "True"} in job["podFailurePolicy"]["rules"][2]["onPodConditions"]

    def test_pod_has_no_privileges_and_its_memory_for_itself(self, batch: Batch) -> None:
        for job in read_manifests(render_kubernetes(batch, CHOICE))[1:]:
            pod = job["spec"]["template"]["spec"]
            assert pod["restartPolicy"] == "Never"
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            (container,) = pod["containers"]
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"name": "VSH_AF_VSOCK", "value": "deny"} in container["env"]

    def test_cell_is_the_index_and_the_matrix_is_mounted(self, batch: Batch) -> None:
        text = 'images = ["tiny"] # \u00fc \U0001f600 \x85 \ufeff "quoted" $(HOME)\n'
        config, job, merge = read_manifests(render_kubernetes(batch, replace(CHOICE, matrix_text=text)))
        assert config["data"] == {"matrix.toml": text}
        (cell,) = job["spec"]["template"]["spec"]["containers"]
        assert cell["args"][2:6] == ["run", "/matrix/matrix.toml", "--cell", "$(JOB_COMPLETION_INDEX)"]
        assert merge["spec"]["suspend"]

    def test_shard_has_one_machine_at_a_time_and_repeats_its_own_cells(self, six: Matrix) -> None:
        """The pod has memory for one, and its status after a test that failed lets nothing run again."""
        _, job, _ = read_manifests(render_kubernetes(plan_batch(six, "lab.toml", "out", shards=2), CHOICE))
        (cell,) = job["spec"]["template"]["spec"]["containers"]
        assert cell["args"][4:10] == ["--shard", "auto/2", "--jobs", "1", "--retry-machine-failures", "2"]

    def test_kvm_is_a_resource_of_the_cells_alone(self, batch: Batch) -> None:
        _, job, merge = read_manifests(render_kubernetes(batch, replace(CHOICE, kvm_resource="squat.ai/kvm")))
        (cell,) = job["spec"]["template"]["spec"]["containers"]
        (merging,) = merge["spec"]["template"]["spec"]["containers"]
        assert cell["resources"]["limits"]["squat.ai/kvm"] == "1"
        assert "squat.ai/kvm" not in merging["resources"]["limits"]

    def test_matrix_that_no_config_map_holds_is_refused(self, batch: Batch) -> None:
        with pytest.raises(ConfigError, match="a ConfigMap cannot hold it"):
            render_kubernetes(batch, replace(CHOICE, matrix_text="#" * 1_000_001))
