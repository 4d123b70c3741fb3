"""Whom a session runs as: users and groups by name and by number."""

import pytest

from tests.vsh.live import StartVshd, Vshd


@pytest.mark.root
@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("12345", b"12345 0 0 12345 /\n"),
        ("12345:54321", b"12345 54321 54321 12345 /\n"),
        ("root:54321", b"0 54321 54321 root "),
        ("nobody:daemon", b"65534 1 1 nobody "),
        ("65534:0", b"65534 0 0 nobody "),
        ("4294967294:4294967294", b"4294967294 4294967294 4294967294 4294967294 /\n"),
    ],
)
def test_user_may_be_a_number_and_have_a_group(vshd: Vshd, mode: list[str], user: str, ids: bytes) -> None:
    done = vshd.run(*mode, f"--user={user}", "--", "sh", "-c", "echo $(id -u; id -g; id -G) $USER $HOME")
    assert done.stdout.startswith(ids), done.stderr


@pytest.mark.root
def test_number_of_a_known_user_has_that_users_groups(vshd: Vshd) -> None:
    by_name = vshd.run("--user=nobody", "--", "id").stdout
    assert vshd.run("--user=65534", "--", "id").stdout == by_name


@pytest.mark.parametrize(
    "user", ["4294967295", "-1", "+0", "0x0", " 0", "root:", ":0", ":", "root:no-such-group", "0:0:0"]
)
def test_user_that_is_neither_name_nor_number_is_refused(vshd: Vshd, mode: list[str], user: str) -> None:
    done = vshd.run(*mode, f"--user={user}", "--", "true")
    assert done.returncode == 1
    assert f"could not find user: {user}".encode() in done.stderr


@pytest.mark.root
def test_restriction_to_users_counts_for_numbers(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--allow_user=nobody", "--allow_user=12345")
    for user, status in (("nobody", 0), ("65534", 0), ("12345", 0), ("0", 1), ("12346", 1)):
        assert vshd.run(f"--user={user}", "--", "true").returncode == status
