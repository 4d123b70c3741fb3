"""The replay of transcripts itself: what counts as printed as shown, and a shell in a terminal."""

import os
from pathlib import Path

import pytest

from tests.docs.pages import read_page
from tests.docs.transcript import Step, clean, is_as_shown, open_shell, parse_transcript, replay


def test_transcript_is_parsed_into_steps() -> None:
    text = "$ vsh \\\n>     --cid 3\ntiny:~# cd /tmp\ntiny:/tmp# ls\na\nb\ntiny:/tmp# exit\n$ true\n"
    assert parse_transcript(text, 5) == [
        Step("$", "vsh --cid 3", "", 5),
        Step("tiny:~#", "cd /tmp", "", 7),
        Step("tiny:/tmp#", "ls", "a\nb\n", 8),
        Step("tiny:/tmp#", "exit", "", 11),
        Step("$", "true", "", 12),
    ]


def test_output_without_a_command_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1: output before the first prompt"):
        parse_transcript("what\n$ true\n")


@pytest.mark.parametrize(
    ("shown", "printed", "matches"),
    [
        ("a\n", "a\n", True),
        ("a\n", "b\n", False),
        ("a\n", "a\nb\n", False),
        ("a\n", "", False),
        ("", "a\n", False),
        ("a ... c\n", "a lot of b c\n", True),
        ("a\n...\nz\n", "a\nz\n", True),
        ("a\n...\nz\n", "a\nb\nc\nz\n", True),
        ("a\n...\nz\n", "a\nb\nzz\n", False),
        ("up in 3.5 s\n", "up in 12 s\n", True),
        ("accelerator tcg\n  no KVM: why\nb\n", "accelerator kvm\nb\n", True),
        ("Linux 6.12.1+deb13-cloud-amd64\n", "Linux 6.1.0-50-cloud-amd64\n", True),
        ("size 3\n", "size 4\n", False),
    ],
)
def test_output_is_compared_but_for_what_varies(shown: str, printed: str, matches: bool) -> None:
    assert is_as_shown(shown, printed) is matches


def test_screen_shows_what_was_written_last() -> None:
    assert clean(b"\x1b[1mone\x1b[0m\r\n 1 %\r 100 %\r\ntwo\xff") == "one\n 100 %\ntwo\ufffd"


def test_page_is_replayed_with_its_files(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh file=bin/hello\n#!/bin/sh\necho hello; exit 3\n```\n\n"
        "```console\n$ rm -rf this-block-is-not-run\n```\n\n"
        "```console run\n$ bin/hello\nhello\n$ echo $?\n3\n```\n"
    )
    folder = tmp_path / "project"
    folder.mkdir()
    with open_shell(folder, os.environ) as shell:
        assert replay(read_page(page), shell, folder) == 2


def test_page_that_shows_something_else_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```console run\n$ echo one\ntwo\n```\n")
    with open_shell(tmp_path, os.environ) as shell, pytest.raises(AssertionError, match=r"page.md:4: \$ echo one"):
        replay(read_page(page), shell, tmp_path)
