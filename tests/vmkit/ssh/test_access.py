"""What ssh is told about a machine."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from vmkit.ssh.access import Access, render_config


def test_config_names_the_machine_its_key_and_its_host_key() -> None:
    text = render_config(Access("m", "alice", Path("/run/x y/ssh")), port=2222, runtime="/run/x y")
    lines = dict(line.strip().split(" ", 1) for line in text.splitlines())
    assert lines["Host"] == "m"
    assert lines["User"] == "alice"
    assert lines["IdentityFile"] == '"/run/x y/ssh/key"'
    assert lines["StrictHostKeyChecking"] == "yes"
    words = shlex.split(lines["ProxyCommand"].replace("%%", "%"))
    assert words[:2] == ["env", "VMKIT_RUNTIME_DIR=/run/x y"]
    assert words[-3:] == ["--vm_name=m", "--proxy=vsock:2222", "--fdpass"]


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh to ask")
def test_ssh_understands_the_config(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(render_config(Access("m", "root", tmp_path), runtime=str(tmp_path)))
    done = subprocess.run(["ssh", "-G", "-F", str(path), "m"], capture_output=True, text=True, check=True)
    assert "proxyusefdpass yes" in done.stdout
    assert f"identityfile {tmp_path}/key" in done.stdout
