"""Silence (docs/reference/protocol.md 2.7), with a clock that the test moves."""

from vshd.wire.silence import Silence


def test_peer_is_lost_after_the_limit() -> None:
    silence = Silence(own_ms=9000, peer_ms=0, now_s=100.0)
    assert not silence.is_peer_lost(108.9)
    assert silence.is_peer_lost(109.0)
    silence.heard(108.9)
    assert not silence.is_peer_lost(117.8)


def test_a_word_is_due_after_a_third_of_the_peers_limit() -> None:
    silence = Silence(own_ms=0, peer_ms=9000, now_s=0.0)
    assert not silence.is_word_due(2.9)
    assert silence.is_word_due(3.0)
    silence.said(3.0)
    assert not silence.is_word_due(5.9)


def test_hold_suspends_the_limit_until_the_next_word() -> None:
    silence = Silence(own_ms=1000, peer_ms=0, now_s=0.0)
    silence.hold()
    assert not silence.is_peer_lost(1e6)
    silence.heard(1e6)
    assert silence.is_peer_lost(1e6 + 1)


def test_wait_is_the_nearest_of_both() -> None:
    assert Silence(own_ms=0, peer_ms=0, now_s=0.0).wait_s(5.0) is None
    assert Silence(own_ms=9000, peer_ms=30000, now_s=0.0).wait_s(1.0) == 8.0
    assert Silence(own_ms=90000, peer_ms=3000, now_s=0.0).wait_s(0.25) == 0.75
    assert Silence(own_ms=1000, peer_ms=0, now_s=0.0).wait_s(7.0) == 0.0
