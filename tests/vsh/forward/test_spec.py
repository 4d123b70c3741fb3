"""What -L, -R, -D and --proxy may say: a table of texts and the places they mean."""

import pytest

from vsh.errors import VshError
from vsh.forward.spec import DYNAMIC, LOCAL, REMOTE, SOCKS, parse_forward, parse_target


@pytest.mark.parametrize(
    ("text", "listen", "target"),
    [
        ("8080:80", "tcp:127.0.0.1:8080", "vsock:80"),
        ("8080:4294967294", "tcp:127.0.0.1:8080", "vsock:4294967294"),
        ("127.0.0.2:8080:80", "tcp:127.0.0.2:8080", "vsock:80"),
        ("[::1]:8080:80", "tcp:[::1]:8080", "vsock:80"),
        ("*:8080:80", "tcp:*:8080", "vsock:80"),
        (":8080:80", "tcp:*:8080", "vsock:80"),
        ("8080:localhost:80", "tcp:127.0.0.1:8080", "tcp:localhost:80"),
        ("8080:[fd00::1]:80", "tcp:127.0.0.1:8080", "tcp:[fd00::1]:80"),
        ("localhost:8080:db:5432", "tcp:localhost:8080", "tcp:db:5432"),
        ("8080:/run/x.sock", "tcp:127.0.0.1:8080", "unix:/run/x.sock"),
        ("/tmp/here:/run/x.sock", "unix:/tmp/here", "unix:/run/x.sock"),
        ("/tmp/here:80", "unix:/tmp/here", "vsock:80"),
        ("unix:here:tcp:localhost:80", "unix:here", "tcp:localhost:80"),
        ("tcp:localhost:1:vsock:2", "tcp:localhost:1", "vsock:2"),
        ("0:unix:rel", "tcp:127.0.0.1:0", "unix:rel"),
    ],
)
def test_local_forwards(text: str, listen: str, target: str) -> None:
    forward = parse_forward(LOCAL, text)
    assert (forward.listen, forward.target) == (listen, target)
    # What is shown can be given again.
    assert parse_forward(LOCAL, str(forward).removeprefix("-L ")) == forward


@pytest.mark.parametrize(
    ("text", "listen", "target"),
    [
        ("8080:80", "tcp:localhost:8080", "tcp:127.0.0.1:80"),
        ("8080:localhost:80", "tcp:localhost:8080", "tcp:localhost:80"),
        ("127.0.0.1:8080:80", "tcp:127.0.0.1:8080", "tcp:127.0.0.1:80"),
        ("*:8080:localhost:80", "tcp:*:8080", "tcp:localhost:80"),
        ("vsock:445:445", "vsock:445", "tcp:127.0.0.1:445"),
        ("vsock:445:/run/samba.sock", "vsock:445", "unix:/run/samba.sock"),
        ("/run/there:/run/here", "unix:/run/there", "unix:/run/here"),
    ],
)
def test_remote_forwards(text: str, listen: str, target: str) -> None:
    forward = parse_forward(REMOTE, text)
    assert (forward.listen, forward.target) == (listen, target)
    assert parse_forward(REMOTE, str(forward).removeprefix("-R ")) == forward


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("1080", "tcp:127.0.0.1:1080"),
        ("0", "tcp:127.0.0.1:0"),
        ("localhost:1080", "tcp:localhost:1080"),
        ("[::1]:1080", "tcp:[::1]:1080"),
        ("*:1080", "tcp:*:1080"),
        (":1080", "tcp:*:1080"),
        ("tcp:10.0.0.1:1080", "tcp:10.0.0.1:1080"),
        ("/run/socks", "unix:/run/socks"),
    ],
)
def test_dynamic_forwards(text: str, listen: str) -> None:
    forward = parse_forward(DYNAMIC, text)
    assert (forward.listen, forward.target) == (listen, SOCKS)
    assert parse_forward(DYNAMIC, str(forward).removeprefix("-D ")) == forward


@pytest.mark.parametrize(
    ("text", "target"),
    [("22", "vsock:22"), ("vsock:22", "vsock:22"), ("[::1]:22", "tcp:[::1]:22"), ("/run/x", "unix:/run/x")],
)
def test_targets_of_a_proxy(text: str, target: str) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        (LOCAL, "", "a place to listen at"),
        (LOCAL, "80", "a place to listen at"),
        (LOCAL, "80:", "'' is no port"),
        (LOCAL, "x:y", "'y' is no port"),
        (LOCAL, "65536:80", "'65536' is no port (0 to 65535)"),
        (LOCAL, "80:4294967295", "is no port"),
        (LOCAL, "80:0", "port 0 is for listening"),
        (LOCAL, "80:host:0", "port 0 is for listening"),
        (LOCAL, "80::90", "the host to connect to is empty"),
        (LOCAL, "a:1:b:2:c", "what is ':c' at its end?"),
        (LOCAL, "[::1:80:90", "a bracket is open"),
        (LOCAL, "vsock:1:2", "cannot listen on vsock for itself"),
        (LOCAL, "²:80", "is no port"),
        (REMOTE, "80:vsock:90", "is no target"),
        (DYNAMIC, "", "'' is no port"),
        (DYNAMIC, "x", "'x' is no port"),
        (DYNAMIC, "a:1:b", "-D takes [ADDRESS:]PORT or /PATH"),
        (DYNAMIC, "1080:localhost:80", "'localhost' is no port"),
        (DYNAMIC, "vsock:1080", "-D takes [ADDRESS:]PORT or /PATH"),
        (REMOTE, "80", "a place to listen at"),
    ],
)
def test_wrong_words_are_named(kind: str, text: str, why: str) -> None:
    with pytest.raises(VshError) as caught:
        parse_forward(kind, text)
    assert why in caught.value.brief
    assert caught.value.status == 64
