"""The verb `rpc`, before it reaches a guest: what it says of a wrong method and a wrong request."""

import builtins
from typing import Any

import pytest
from click.testing import CliRunner

from vmkit.cli.main import vmkit
from vmkit.errors import ConfigError, HostError
from vmkit.maitred.client import Maitred
from vsh.address import Address
from vsh.errors import VshError


def run(*words: str) -> VshError:
    """The error that the verb ends with."""
    error = CliRunner().invoke(vmkit, ["rpc", "nowhere", "maitred", *words]).exception
    assert isinstance(error, VshError), error
    return error


@pytest.mark.parametrize(
    ("words", "brief", "hint"),
    [
        (["GetKernel"], "maitred has no method 'GetKernel'", "the methods are: GetAvailableSpace, GetKernelVersion"),
        (["LaunchProcess", "{"], "the request is not JSON", "such as '{"),
        (["LaunchProcess", "[]"], "the request must be a JSON object", ""),
        (["LaunchProcess", '{"arg": []}'], "the request has no field 'arg'", "did you mean 'argv'?"),
    ],
)
def test_wrong_call_is_explained_without_a_machine(words: list[str], brief: str, hint: str) -> None:
    error = run(*words)
    assert isinstance(error, ConfigError)
    assert error.brief.startswith(brief)
    assert error.hint.startswith(hint)


def test_missing_grpclib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def load(name: str, *words: Any) -> Any:
        if name == "vmkit.maitred.channel":
            raise ModuleNotFoundError("No module named 'grpclib'", name="grpclib")
        return real(name, *words)

    monkeypatch.setattr(builtins, "__import__", load)
    with pytest.raises(HostError, match="a client of maitred needs the Python package grpclib") as caught:
        Maitred(Address.unix("/nonexistent"))
    assert "vmkit-vsh[rpc]" in caught.value.hint
