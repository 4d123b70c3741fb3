"""The plugin in runs of pytest that need no machine: what it adds, what it costs, and its errors."""

import subprocess
import sys
from pathlib import Path

DEADLINE_S = 60.0
# It fails without a machine: an error of vmkit's that the test does not catch.
RAISING = """
import vmkit

def test():
    vmkit.find_machine("no-such-machine")
"""
WATCH = """
import sys
import pytest

def pytest_sessionfinish():
    heavy = [name for name in ("click", "vmkit.machine.start", "vmkit.pool.pool", "asyncio") if name in sys.modules]
    print("heavy:", heavy)
"""


def run_pytest(folder: Path, text: str, *words: str) -> "subprocess.CompletedProcess[str]":
    (folder / "test_it.py").write_text(text)
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *words]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_run_without_machines_loads_nothing_of_vmkit(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(WATCH)
    done = run_pytest(tmp_path, "def test(): pass\n", "-s")
    assert done.returncode == 0, done.stdout
    assert "heavy: []" in done.stdout


def test_fixtures_marker_and_options_are_listed(tmp_path: Path) -> None:
    fixtures = run_pytest(tmp_path, "", "--fixtures").stdout
    for name in ("vm", "vm_module", "vm_session", "vm_factory"):
        assert f"\n{name} " in fixtures
    assert "@pytest.mark.vm(image=, kernel=" in run_pytest(tmp_path, "", "--markers").stdout
    shown = run_pytest(tmp_path, "", "--help").stdout
    assert "--vm-keep-on-failure" in shown
    assert "vm_memory" in shown


def test_wrong_marker_names_the_word_and_costs_its_test_alone(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.vm(imege='tiny')\ndef test(vm): pass\ndef test_other(): pass\n"
    done = run_pytest(tmp_path, text)
    assert "1 passed, 1 error" in done.stdout
    assert "test_it.py::test: the marker vm has no 'imege'" in done.stdout
    assert "INTERNALERROR" not in done.stdout + done.stderr
    # The author has no use for the plugin's own lines, nor for the error that it had inside.
    assert "plugin.py" not in done.stdout
    assert "another exception" not in done.stdout
    assert len(done.stdout.splitlines()) < 12


def test_list_of_what_takes_one_value_is_refused_with_the_way_to_write_it(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.vm(memory=['128M', '1G'])\ndef test(vm): pass\n"
    done = run_pytest(tmp_path, text)
    assert "'memory' of the marker vm takes one value" in done.stdout
    assert "marks=pytest.mark.vm(memory=...)" in done.stdout


def test_other_ways_to_parametrize_the_machine_are_refused(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.parametrize('vm', [1], indirect=True)\ndef test(vm): pass\n"
    assert "by a list in the marker vm, and not by parametrize" in run_pytest(tmp_path, text).stdout


def test_wrong_value_is_the_tests_error(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.vm(memory='much')\ndef test(vm): pass\ndef test_other(): pass\n"
    done = run_pytest(tmp_path, text)
    assert "1 passed, 1 error" in done.stdout
    assert "vm: vmkit: 'much' is not an amount of memory" in done.stdout
    assert "plugin.py" not in done.stdout
    assert "another exception" not in done.stdout


def test_error_of_vmkit_ends_the_traceback_at_the_line_of_the_test(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, RAISING)
    assert "test_it.py:5: MachineError" in done.stdout
    assert "no-such-machine" in done.stdout
    assert "vmkit/" not in done.stdout
    whole = run_pytest(tmp_path, RAISING, "--full-trace")
    assert "vmkit/" in whole.stdout


def test_other_error_keeps_the_lines_of_vmkit(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "import vmkit\ndef test(): vmkit.Client(None).run(['true'])\n")
    assert "AttributeError" in done.stdout
    assert "vsh/" in done.stdout


def test_list_makes_one_test_of_each(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.vm(image=['tiny', 'debian'])\ndef test(vm): pass\n"
    done = run_pytest(tmp_path, text, "--collect-only")
    assert "test_it.py::test[tiny]" in done.stdout
    assert "test_it.py::test[debian]" in done.stdout


def test_list_is_refused_where_one_machine_is_made(tmp_path: Path) -> None:
    text = """
import pytest
pytestmark = pytest.mark.vm(image=["tiny", "debian"])
def test_module(vm_module): pass
def test_factory(vm_factory): vm_factory()
"""
    done = run_pytest(tmp_path, text)
    assert "1 failed, 1 error" in done.stdout
    for name in ("vm_module", "vm_factory"):
        assert f"{name} takes one image and one kernel" in done.stdout


def test_forked_child_ends_no_pool(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        """
import os
from vmkit.testing import plugin

def pytest_configure(config):
    class Supply:
        def finish(self): pass
        def end(self): print("ends pools:", os.getpid() == parent)
    parent = os.getpid()
    config.stash[plugin._SUPPLY] = Supply()
"""
    )
    text = (
        "import os\ndef test():\n    child = os.fork()\n    if not child: raise SystemExit\n    os.waitpid(child, 0)\n"
    )
    done = run_pytest(tmp_path, text, "-s")
    assert "ends pools: True" in done.stdout
    assert "ends pools: False" not in done.stdout
