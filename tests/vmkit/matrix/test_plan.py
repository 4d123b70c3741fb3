"""Matrix files and reports: what becomes of each key, and of each mistake."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from vmkit.errors import ConfigError, HostError
from vmkit.junit import CaseVerdict
from vmkit.matrix import execute
from vmkit.matrix.execute import find_jobs
from vmkit.matrix.plan import Matrix, pick_cells, plan_matrix, read_matrix
from vmkit.matrix.report import render_github, render_report, render_rows
from vmkit.matrix.results import CellResult

CHECKOUT = Path(__file__).resolve().parents[3]
FILE = Path("/lab/lab.toml")
COMMANDS = {"uname": "uname -a", "words": ["echo", "a b"]}


def plan(**raw: Any) -> Matrix:
    return plan_matrix({"commands": COMMANDS, **raw}, FILE)


def test_everything_times_everything() -> None:
    matrix = plan(images=["tiny", "./my.toml"], kernels=["", "./bzImage"], backends=["user", "vhost"])
    names = [cell.name for cell in matrix.cells]
    assert len(names) == len(set(names)) == 8
    assert names[0] == "tiny/own/user" and names[-1] == "my/bzImage/vhost"
    assert matrix.cells[-1].image == "/lab/my.toml" and matrix.cells[-1].kernel == Path("/lab/bzImage")
    assert [command.argv for command in matrix.cells[0].commands] == [("sh", "-c", "uname -a"), ("echo", "a b")]


def test_roots_are_found_from_the_files_folder_and_name_their_cells() -> None:
    images = ["./root.tar.gz", "../disk.qcow2", "oci:layout:v1.2", "docker-archive:/saved/web.tar", "/srv/base"]
    cells = plan(images=[*images, "docker://registry.example/debian:12.5", "docker://debian:12.6"]).cells
    assert [cell.image for cell in cells] == [
        "/lab/root.tar.gz",
        "/lab/../disk.qcow2",
        "oci:/lab/layout:v1.2",
        "docker-archive:/saved/web.tar",
        "/srv/base",
        "docker://registry.example/debian:12.5",
        "docker://debian:12.6",
    ]
    names = [cell.name.removesuffix("/own/auto") for cell in cells]
    assert names == ["root", "disk", "layout-v1.2", "web", "base", "debian-12.5", "debian-12.6"]


def test_architectures_multiply_and_the_hosts_own_is_not_named() -> None:
    cells = plan(images=["tiny"], backends=["user"], architectures=["amd64", "s390x"]).cells
    assert [(cell.name, cell.architecture) for cell in cells] == [
        ("tiny/own/user", "amd64"),
        ("tiny/own/user/s390x", "s390x"),
    ]


def test_fresh_gives_each_command_a_machine() -> None:
    assert [cell.name for cell in plan(fresh=True).cells] == ["tiny/own/auto/uname", "tiny/own/auto/words"]


def test_name_of_a_cell_does_not_depend_on_the_number_of_commands() -> None:
    assert [cell.name for cell in plan(commands={"uname": "uname -a"}).cells] == ["tiny/own/auto"]
    assert [cell.name for cell in plan(commands={"a": "true"}, fresh=True).cells] == ["tiny/own/auto/a"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"image": ["tiny"]}, "unknown key 'image'"),
        ({"images": []}, "images: must be a list"),
        ({"images": "tiny"}, "images: must be a list"),
        ({"images": ["-"]}, "images: a matrix reads no root from standard input"),
        ({"images": ["oci:"]}, "/lab/lab.toml: images: 'oci:' names no file"),
        ({"images": ["ftp://x"]}, "images: 'ftp://x' begins with 'ftp:'"),
        ({"backends": ["kernel"]}, "backends: must be one of auto, user, vhost, not 'kernel'"),
        ({"architectures": ["x86"]}, "architectures: must be one of amd64, arm64, riscv64, s390x, not 'x86'"),
        ({"commands": {}}, r"\[commands\] is missing"),
        ({"commands": {"a b": "x"}}, "cannot be a name"),
        ({"commands": {"a": ""}}, "commands.a: must be a line"),
        ({"commands": {"a": [1]}}, "commands.a: must be a line"),
        ({"cpus": 0}, "cpus: must be more than 0"),
        ({"cpus": True}, "cpus: must be a value such as 1, not true"),
        ({"timeout": "long"}, "timeout: must be a value such as 600.0, not 'long'"),
        ({"memory": "much"}, "memory|much"),
        ({"images": ["a/my.toml", "b/my.toml"]}, "two cells are called my/own/auto"),
        ({"kernels": [f"k{n}" for n in range(100_001)]}, "100001 machines are more than 100000"),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**raw)


@pytest.mark.parametrize("content", [b"\xff", b"= =", b"x" * (1 << 20) + b"y"])
def test_file_that_is_no_matrix(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        read_matrix(tmp_path / "m.toml")


def test_document_has_a_matrix_that_is_read(tmp_path: Path) -> None:
    found = re.search(r"```toml\n(.*?)```", (CHECKOUT / "docs/howto/matrix.md").read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "m.toml").write_text(found[1])
    assert len(read_matrix(tmp_path / "m.toml").cells) == 8
    # As an editor of Windows writes it.
    (tmp_path / "m.toml").write_text("\ufeff" + found[1])
    assert len(read_matrix(tmp_path / "m.toml").cells) == 8


def test_cells_are_picked_by_name() -> None:
    matrix = plan(backends=["user", "vhost"])
    assert [cell.name for cell in pick_cells(matrix, ["tiny/own/vhost"])] == ["tiny/own/vhost"]
    assert pick_cells(matrix, []) == matrix.cells
    with pytest.raises(ConfigError, match="no cell 'x'"):
        pick_cells(matrix, ["x"])


def test_jobs_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "read_available_memory_mib", lambda: 2000)
    assert find_jobs(plan(memory=256), 100) == 4
    assert find_jobs(plan(memory=256), 2) == 2
    with pytest.raises(HostError, match="not enough memory"):
        find_jobs(plan(memory="4G"), None)


def test_github_output_is_json_in_one_line() -> None:
    line = render_github(plan(backends=["user", "vhost"]).cells)
    assert json.loads(line.removeprefix("matrix=")) == {
        "include": [{"cell": "tiny/own/user"}, {"cell": "tiny/own/vhost"}]
    }


def test_report_tells_all_kinds_of_outcomes() -> None:
    cell = plan().cells[0]
    outcomes = [
        CellResult(cell, cell.commands[0], verdict, 1.5, "why", "text \x00\x1b[0m <&>") for verdict in CaseVerdict
    ]
    suite = Xml.fromstring(render_report(outcomes))[0]
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "1", "errors": "1", "skipped": "1"
    }  # fmt: skip
    assert [case[0].tag for case in suite] == ["system-out", "failure", "error", "skipped"]
    assert suite[1].get("classname") == "tiny.own.auto"
    assert "<&>" in str(suite[1][0].text)
    assert [row[5] for row in render_rows(outcomes)] == ["passed", "failed: why", "error: why", "skipped: why"]


def test_large_matrix_is_planned_and_has_short_errors() -> None:
    matrix = plan(kernels=[f"k{number}" for number in range(100_000)])
    assert len(matrix.cells) == 100_000
    with pytest.raises(ConfigError, match="no cell 'x'") as failure:
        pick_cells(matrix, ["x"])
    assert failure.value.hint.endswith("tiny/k19/auto, and more")


def test_digest_is_of_what_the_file_says_and_of_no_path() -> None:
    here = plan(images=["./my.toml"], kernels=["./bzImage"])
    there = plan_matrix({"commands": COMMANDS, "images": ["./my.toml"], "kernels": ["./bzImage"]}, Path("/tmp/x.toml"))
    assert here.digest == there.digest
    others = [plan(), plan(memory="512M"), plan(timeout=5), plan(ktap=["uname"]), plan(fresh=True), plan(cpus=2)]
    others.append(plan_matrix({"commands": {**COMMANDS, "uname": "uname -r"}}, FILE))
    assert len({here.digest, *(matrix.digest for matrix in others)}) == len(others) + 1
