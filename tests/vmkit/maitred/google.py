"""The classes that Google's protobuf makes of our .proto files: an independent codec to compare ours with.

Owns a reader of the part of the language that those files use.
"""

import re
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tests.vsh.live import CHECKOUT

PROTO = CHECKOUT / "vmkit/maitred/proto/vm_guest.proto"
TYPES = {
    "bytes": 12,
    "int64": 3,
    "uint64": 4,
    "int32": 5,
    "bool": 8,
    "string": 9,
    "message": 11,
    "uint32": 13,
    "enum": 14,
}
TYPES |= {"sint32": 17}
OPTIONAL, REPEATED = 1, 3

_COMMENT = re.compile(r"//[^\n]*")
_BLOCK = re.compile(r"(message|enum|service) (\w+) \{([^}]*)\}")
_FIELD = re.compile(r"(?:(repeated|optional) )?(map<string, string>|\w+) (\w+) = (\d+);")
_RPC = re.compile(r"rpc (\w+)\((\w+)\) returns \((\w+)\);")


def read_proto(path: Path) -> tuple[Any, dict[str, tuple[str, str]]]:
    """The file's messages as a FileDescriptorProto, and the methods of its services: their messages."""
    text = _COMMENT.sub("", path.read_text())
    file = descriptor_pb2.FileDescriptorProto(name=path.name, package="vm_tools", syntax="proto3")
    blocks = _BLOCK.findall(text)
    enums = {name for kind, name, _ in blocks if kind == "enum"}
    methods: dict[str, tuple[str, str]] = {}
    for kind, name, body in blocks:
        if kind == "message":
            _add_message(file.message_type.add(name=name), body, enums)
        elif kind == "enum":
            enum = file.enum_type.add(name=name)
            for value, number in re.findall(r"(\w+) = (\d+);", body):
                enum.value.add(name=value, number=int(number))
        else:
            methods |= {method: (request, reply) for method, request, reply in _RPC.findall(body)}
    return file, methods


def _add_message(message: Any, body: str, enums: set[str]) -> None:
    for label, kind, name, number in _FIELD.findall(body):
        field = message.field.add(name=name, number=int(number), label=REPEATED if label == "repeated" else OPTIONAL)
        if kind.startswith("map"):
            entry = message.nested_type.add(name=f"{name.title()}Entry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, type=TYPES["string"], label=OPTIONAL)
            entry.field.add(name="value", number=2, type=TYPES["string"], label=OPTIONAL)
            field.label, field.type = REPEATED, TYPES["message"]
            field.type_name = f".vm_tools.{message.name}.{entry.name}"
        elif kind in TYPES:
            field.type = TYPES[kind]
        else:
            field.type = TYPES["enum" if kind in enums else "message"]
            field.type_name = f".vm_tools.{kind}"
        if label == "optional":
            field.proto3_optional = True
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{name}")


def make_classes(file: Any) -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"vm_tools.{message.name}"))
        for message in file.message_type
    }


FILE, METHODS = read_proto(PROTO)
CLASSES = make_classes(FILE)
