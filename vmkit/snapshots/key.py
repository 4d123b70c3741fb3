"""What a snapshot depends on, as one digest: memory that was saved under one set of facts fits no other. Pure."""

import hashlib
import json
from collections.abc import Mapping

from vshd.wire.version import __version__

# Raised when what is saved, or how, changes its meaning.
SCHEMA = 1
# Digits of a key that a person sees and types.
SHOWN_DIGITS = 12

# What differs, in words, by the fact that does.
WORDS = {
    "schema": "vmkit's form of snapshots",
    "vmkit": "vmkit",
    "image": "the image",
    "qemu": "QEMU",
    "argv": "the machine's options",
    "accelerator": "the accelerator",
    "processor": "this host's processor",
    "files": "a kernel or a disk",
}


def find_version() -> str:
    """vmkit's own version, which is a fact, too."""
    return __version__


def make_key(facts: Mapping[str, object]) -> str:
    """The key of a snapshot that was, or would be, saved under these facts."""
    return hashlib.sha256(render_facts(facts).encode()).hexdigest()


def render_facts(facts: Mapping[str, object]) -> str:
    """The facts as text, the same for equal facts."""
    return json.dumps(facts, sort_keys=True, ensure_ascii=True)


def describe_difference(saved: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Names in words what differs between two sets of facts; empty when nothing does."""
    names = sorted(saved.keys() | now.keys(), key=lambda name: (list(WORDS).index(name) if name in WORDS else -1, name))
    different = [name for name in names if render_facts({"": saved.get(name)}) != render_facts({"": now.get(name)})]
    return ", ".join(WORDS.get(name, name) for name in different)
