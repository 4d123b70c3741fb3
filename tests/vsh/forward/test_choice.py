"""Which ports of a guest are forwarded by themselves, and at which ports of this host."""

import pytest

from vsh.errors import UsageError
from vsh.forward.choice import (
    EVERY_PORT,
    FORWARDED_MAX,
    TRIED_MAX,
    AutomaticSpec,
    Ranges,
    list_candidates,
    parse_ports,
    render_target,
)

LOOPBACK = b"\x7f\0\0\1"


def make_spec(include: Ranges = EVERY_PORT, exclude: Ranges = ()) -> AutomaticSpec:
    return AutomaticSpec(lambda _: None, lambda _: None, include, exclude)


@pytest.mark.parametrize(
    ("texts", "ranges"),
    [
        (["80"], (range(80, 81),)),
        (["80,8000-8099"], (range(80, 81), range(8000, 8100))),
        (["1-65535"], (range(1, 65536),)),
        ([" 80 , 81", "82-82"], (range(80, 81), range(81, 82), range(82, 83))),
    ],
)
def test_ports_are_numbers_and_ranges(texts: list[str], ranges: Ranges) -> None:
    assert parse_ports(texts) == ranges


@pytest.mark.parametrize("word", ["", "0", "65536", "9-8", "-", "80-", "-80", "1-65536", "x", "²", "80-90-100", "1 2"])
def test_word_that_names_no_ports_is_named(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ports([f"80,{word}"])
    assert caught.value.brief == f"'{word}' names no ports"
    assert caught.value.status == 64


def test_lists_choose_among_the_guests_ports() -> None:
    ports = dict.fromkeys((22, 80, 8000, 8001), LOOPBACK)
    spec = make_spec(parse_ports(["80,8000-8099"]), parse_ports(["8001"]))
    assert spec.choose(ports, ()) == ({80: LOOPBACK, 8000: LOOPBACK}, 0)


def test_lowest_ports_are_forwarded_where_there_are_too_many() -> None:
    ports = dict.fromkeys(range(1000, 1000 + FORWARDED_MAX + 5), LOOPBACK)
    chosen, too_many = make_spec().choose(ports, ())
    assert (sorted(chosen), too_many) == (list(range(1000, 1000 + FORWARDED_MAX)), 5)


def test_port_that_is_forwarded_stays_when_many_others_come() -> None:
    ports = dict.fromkeys(range(1, 5000), LOOPBACK)
    chosen, _ = make_spec().choose(ports, kept=[4999])
    assert 4999 in chosen
    assert len(chosen) == FORWARDED_MAX


def test_next_numbers_are_tried_in_order() -> None:
    tried = list(list_candidates(8000, is_privileged=False))
    assert tried == list(range(8001, 8001 + TRIED_MAX))


def test_privileged_port_goes_up_by_8000() -> None:
    tried = list(list_candidates(80, is_privileged=True))
    assert (tried[0], len(tried)) == (8080, TRIED_MAX)


@pytest.mark.parametrize("port", [65535, 65530])
def test_last_numbers_are_followed_by_lower_ones(port: int) -> None:
    tried = list(list_candidates(port, is_privileged=False))
    assert tried[: 65535 - port] == list(range(port + 1, 65536))
    assert tried[65535 - port] == port - 1
    assert (len(tried), len(set(tried)), port in tried) == (TRIED_MAX, TRIED_MAX, False)


@pytest.mark.parametrize("port", range(1, 65536, 257))
@pytest.mark.parametrize("is_privileged", [False, True])
def test_every_port_has_other_numbers_to_try(port: int, is_privileged: bool) -> None:
    tried = list(list_candidates(port, is_privileged=is_privileged))
    assert tried
    assert port not in tried
    assert all(0 < number < 65536 for number in tried)


@pytest.mark.parametrize(
    ("address", "target"),
    [
        (bytes(4), "tcp:127.0.0.1:80"),
        (LOOPBACK, "tcp:127.0.0.1:80"),
        (b"\x0a\0\0\2", "tcp:10.0.0.2:80"),
        (bytes(16), "tcp:localhost:80"),
        (bytes(15) + b"\1", "tcp:[::1]:80"),
        (b"\xfd" + bytes(15), "tcp:[fd00::]:80"),
    ],
)
def test_target_is_where_the_guest_itself_reaches_the_port(address: bytes, target: str) -> None:
    assert render_target(address, 80) == target
