"""`vmkit bench report` and `compare`, which need files of figures and no machine."""

from pathlib import Path

import pytest

from tests.vmkit.bench.test_figures import make_outcome
from tests.vmkit.cli.conftest import Vmkit
from vmkit.bench.series import render_outcome


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(render_outcome(make_outcome()))
    return path


@pytest.mark.parametrize(("words", "suffix"), [((), ".svg"), (("--format", "png"), ".png")])
def test_report_makes_plots_of_the_format_asked_for(
    vmkit: Vmkit, figures: Path, tmp_path: Path, words: tuple[str, ...], suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    done = vmkit("bench", "report", str(figures), "--to", str(tmp_path / "to"), *words)
    assert done.status == 0
    assert "| exec | vsh | 110 ms |" in done.out
    assert done.err == f"vmkit: open {tmp_path}/to/report.html\n"
    suffixes = {path.suffix for path in (tmp_path / "to").iterdir()}
    assert suffixes == {".html", ".md", suffix}


def test_compare_says_what_changed(vmkit: Vmkit, figures: Path, tmp_path: Path) -> None:
    slower = tmp_path / "slower.json"
    slower.write_text(render_outcome(make_outcome(2.0)).replace('"tcg"', '"kvm"').replace("67108864", "1048576"))
    done = vmkit("bench", "compare", str(figures), str(slower))
    assert done.status == 0
    assert done.err == (
        "vmkit: not alike: accelerator: tcg and kvm\n"
        "vmkit: not alike: bulk out: transfers are of other sizes, and so is what of them is the start of a session\n"
    )
    assert "worse        exec: vsh: 2.00 times" in done.out
