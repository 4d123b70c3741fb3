"""The stage of the Dockerfile that fetches packages holds a part of the checkout: every module that it imports."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]
COPY = re.compile(r"^COPY (?!--)(?P<sources>.+) /src/(?P<target>\S*)$", re.MULTILINE)


def test_fetch_stage_has_every_module_it_imports(tmp_path: Path) -> None:
    stage = (CHECKOUT / "Dockerfile").read_text().partition("RUN /src/fetch")[0]
    for match in COPY.finditer(stage):
        target = tmp_path / match["target"]
        for word in match["sources"].split():
            source = CHECKOUT / word
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                where = target / source.name if match["target"].endswith("/") else target
                where.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, where)
    program = [sys.executable, "-B", str(tmp_path / "fetch"), "no-such-image"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, env={}, check=False)
    # An error is rendered by modules that are loaded late.
    assert (done.returncode, done.stderr.startswith("vmkit-docker: ")) == (1, True), done.stderr
    assert "Traceback" not in done.stderr
