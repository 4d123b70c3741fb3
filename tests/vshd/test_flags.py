"""vshd's command line."""

import pytest

from vshd.flags import HELP, FlagError, Options, parse_flags


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ([], "default_user", "root"),
        (["--default_user=arc"], "default_user", "arc"),
        (["-default-user=arc"], "default_user", "arc"),
        (["--inherit_env"], "inherit_env", True),
        (["--inherit-env=true"], "inherit_env", True),
        (["--allow_to_switch_user=false"], "allow_to_switch_user", False),
        (["--noallow_to_switch_user"], "allow_to_switch_user", False),
        (["--nolog_kmsg"], "log_kmsg", False),
        (["--forward_to_host_port=1", "--forward_to_host_port=2"], "forward_to_host_port", 2),
        (["--v=1", "--vmodule=x=2", "--"], "listen", "vsock:9001"),
        (["--allow_cid=3", "--allow-cid=4"], "allow_cid", ["3", "4"]),
    ],
)
def test_flags_are_spelled_as_upstreams(words: list[str], name: str, value: bool | int | str | list[str]) -> None:
    assert getattr(parse_flags(words), name) == value


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--nonsense"], 64, "vshd: ERROR: unknown command line flag 'nonsense'"),
        (["--nodefault_user"], 64, "unknown command line flag 'nodefault_user'"),
        (["--inherit_env=maybe"], 65, "illegal value 'maybe' specified for bool flag 'inherit_env'"),
        (["--forward_to_host_port=x"], 65, "illegal value 'x' specified for uint32 flag 'forward_to_host_port'"),
        (["--forward_to_host_port=4294967296"], 65, "uint32 flag"),
        (["--default_user"], 65, "needs a value"),
        (["extra"], 1, "Unknown extra command line arguments; exiting"),
        (["--", "extra"], 1, "Unknown extra command line arguments; exiting"),
        (["-"], 1, "Unknown extra command line arguments; exiting"),
    ],
)
def test_wrong_flags_are_named(words: list[str], status: int, text: str) -> None:
    with pytest.raises(FlagError) as caught:
        parse_flags(words)
    assert caught.value.status == status
    assert text in str(caught.value)


def test_help_names_every_flag() -> None:
    for name in Options.__slots__:
        assert f"--{name}" in HELP
