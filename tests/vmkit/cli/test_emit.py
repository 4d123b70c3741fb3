"""`vmkit matrix emit` for Slurm and Kubernetes: what it prints, and which matrix it refuses."""

from pathlib import Path

import pytest
import yaml

from tests.vmkit.cli.conftest import Vmkit

MATRIX = 'images = ["tiny"]\n[commands]\none = "true"\n'


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    path = tmp_path / "lab.toml"
    path.write_text(MATRIX)
    return path


def test_slurm_script_has_whole_paths(vmkit: Vmkit, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.parent)
    done = vmkit("matrix", "emit", "slurm", "lab.toml", "--to", "out")
    assert (done.status, done.err) == (0, "")
    assert f"vmkit matrix run {lab} --cell" in done.out
    assert f"results={lab.parent}/out" in done.out


def test_kubernetes_manifests_have_the_matrix(vmkit: Vmkit, lab: Path) -> None:
    done = vmkit("matrix", "emit", "kubernetes", str(lab), "--container-image", "vmkit:1", "--retries", "0")
    assert (done.status, done.err) == (0, "")
    config, job, _ = yaml.safe_load_all(done.out)
    assert config["data"] == {"matrix.toml": MATRIX}
    assert job["spec"]["backoffLimitPerIndex"] == 0


def test_matrix_in_the_container_image_needs_no_config_map(vmkit: Vmkit, lab: Path) -> None:
    lab.write_text(MATRIX.replace("tiny", "./my.toml"))
    words = ["matrix", "emit", "kubernetes", str(lab), "--container-image", "vmkit:1"]
    refused = vmkit(*words)
    assert refused.status == 64
    assert "my.toml, and a ConfigMap has the matrix alone" in refused.err
    assert "--file-in-image" in refused.err
    done = vmkit(*words, "--file-in-image", "/srv/lab.toml")
    job, _ = yaml.safe_load_all(done.out)
    (cell,) = job["spec"]["template"]["spec"]["containers"]
    assert "/srv/lab.toml" in cell["args"]


@pytest.mark.parametrize("named", ["./my.toml", "my.toml", "docker://debian:stable"])
def test_recipe_beside_the_matrix_is_refused_in_its_own_folder(
    vmkit: Vmkit, lab: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.parent)
    lab.write_text(MATRIX.replace("tiny", named))
    refused = vmkit("matrix", "emit", "kubernetes", "lab.toml", "--container-image", "vmkit:1")
    assert refused.status == 64
    assert f"the matrix names {named.removeprefix('./')}, and a ConfigMap has the matrix alone" in refused.err


def test_too_many_shards_are_refused(vmkit: Vmkit, lab: Path) -> None:
    done = vmkit("matrix", "emit", "slurm", str(lab), "--to", "out", "--shards", "2")
    assert done.status == 64
    assert "--shards must be at most 1, the number of cells, not 2" in done.err
