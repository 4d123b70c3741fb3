"""Our messages against the .proto file that we give to other programs, read by Google's protobuf."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmkit.maitred.google import CLASSES, FILE, TYPES
from tests.vmkit.maitred.google import METHODS as PROTO_METHODS
from vmkit.maitred import messages
from vmkit.maitred.messages import METHODS
from vshd.wire.proto3 import (
    BOOL,
    BYTES,
    BYTES_LIST,
    BYTES_MAP,
    INT32,
    MESSAGE,
    SINT32,
    UINT32,
    UINT64,
    Field,
    Message,
)

OURS = {name: kind for name, kind in vars(messages).items() if isinstance(kind, type) and issubclass(kind, Message)}
del OURS["Message"]
# Ours, and those of protobuf that have the same bytes.
KINDS = {
    BOOL: {"bool"},
    BYTES: {"string"},
    BYTES_LIST: {"string"},
    BYTES_MAP: {"message"},
    INT32: {"int32", "enum"},
    MESSAGE: {"message"},
    SINT32: {"sint32"},
    UINT32: {"uint32"},
    UINT64: {"uint64", "int64"},
}
NAMES_OF_TYPES = {number: name for name, number in TYPES.items()}
TEXT = st.text(max_size=20)
VALUES = {
    BOOL: st.booleans(),
    BYTES: TEXT,
    BYTES_LIST: st.lists(TEXT, max_size=3),
    BYTES_MAP: st.dictionaries(TEXT, TEXT, max_size=3),
    # Those that the enumeration has as well.
    INT32: st.integers(0, 4),
    SINT32: st.integers(-(1 << 31), (1 << 31) - 1),
    UINT32: st.integers(0, (1 << 32) - 1),
    UINT64: st.integers(0, (1 << 63) - 1),
}


def test_messages_are_those_of_the_file() -> None:
    assert set(OURS) == set(CLASSES)
    for message in FILE.message_type:
        fields = {field.number: field for field in OURS[message.name].FIELDS}
        assert {number: field.name for number, field in fields.items()} == {
            field.number: field.name for field in message.field
        }, message.name
        for field in message.field:
            assert NAMES_OF_TYPES[field.type] in KINDS[fields[field.number].kind], (message.name, field.name)


def test_methods_are_those_of_the_file() -> None:
    assert {name: (method.request.__name__, method.response.__name__) for name, method in METHODS.items()} == (
        PROTO_METHODS
    )


def encode(field: Field, value: object) -> object:
    """A value of Google's as ours has it."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [item.encode() for item in value]
    if isinstance(value, dict):
        return {key.encode(): item.encode() for key, item in value.items()}
    return value


@pytest.mark.parametrize("name", sorted(name for name, kind in OURS.items() if kind.FIELDS))
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_bytes_are_those_of_googles_codec(name: str, data: st.DataObject) -> None:
    ours, theirs = OURS[name](), CLASSES[name]()
    for field in OURS[name].FIELDS:
        if field.kind == MESSAGE:
            seconds, nanos = data.draw(st.integers(0, (1 << 63) - 1)), data.draw(st.integers(0, 999_999_999))
            theirs.time.seconds, theirs.time.nanos = seconds, nanos
            setattr(ours, field.name, messages.Timestamp(seconds, nanos))
            continue
        value = data.draw(VALUES[field.kind], label=field.name)
        setattr(ours, field.name, encode(field, value))
        if field.kind == BYTES_LIST:
            getattr(theirs, field.name).extend(value)
        elif field.kind == BYTES_MAP:
            getattr(theirs, field.name).update(value)
        else:
            setattr(theirs, field.name, value)
    # The order of a map's entries, and of a field that is written though it is 0, is free.
    assert CLASSES[name].FromString(ours.encode()) == theirs
    again = OURS[name]()
    again.merge(theirs.SerializeToString())
    for field in OURS[name].FIELDS:
        if field.kind != MESSAGE:
            assert getattr(again, field.name) == getattr(ours, field.name)


def test_uid_that_was_not_sent_is_not_0() -> None:
    request = messages.SetUpUserRequest()
    request.merge(CLASSES["SetUpUserRequest"](username="ann").SerializeToString())
    assert request.uid is None
    request.merge(CLASSES["SetUpUserRequest"](uid=0).SerializeToString())
    assert request.uid == 0
    assert CLASSES["SetUpUserRequest"].FromString(request.encode()).HasField("uid")
