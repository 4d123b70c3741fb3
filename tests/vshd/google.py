"""Upstream's vsh.proto with our extensions for Google's protobuf: an independent codec to compare ours with."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

VENDOR = 52001

_TYPES = {
    "int32": 5,
    "uint64": 4,
    "bool": 8,
    "string": 9,
    "bytes": 12,
    "uint32": 13,
    "sint32": 17,
}

# message: rows of (number, name, type or message name, flags); "*" repeated, "o" member of the oneof.
MESSAGES = {
    "Failure": [(1, "kind", "int32", ""), (2, "error", "uint32", ""), (3, "subject", "bytes", "")],
    "Extended": [
        (1, "version", "uint32", ""),
        (2, "features", "uint64", ""),
        (3, "max_data", "uint32", ""),
        (4, "window", "uint32", ""),
        (5, "silence_ms", "uint32", ""),
        (6, "request_size", "uint32", ""),
        (7, "failure", "Failure", ""),
        (8, "nonce", "bytes", ""),
    ],
    "Freeze": [(1, "secret", "bytes", "")],
    "Thaw": [
        (1, "hostname", "bytes", ""),
        (2, "entropy", "bytes", ""),
        (3, "machine_id", "bytes", ""),
        (4, "boot_id", "bytes", ""),
        (5, "token", "bytes", ""),
    ],
    "Clock": [],
    "PowerOff": [],
    "Units": [],
    "Logs": [(1, "collector", "bytes", ""), (2, "next", "uint64", "")],
    "Cores": [(1, "size", "uint64", "")],
    "Subsystem": [(1, "name", "bytes", ""), (2, "user", "bytes", "")],
    "Share": [
        (1, "path", "bytes", ""),
        (2, "source", "bytes", ""),
        (3, "read_only", "bool", ""),
        (4, "by", "bytes", ""),
    ],
    "Lasting": [
        (1, "verb", "int32", ""),
        (2, "session", "bytes", ""),
        (3, "user", "bytes", ""),
        (4, "command", "bytes", ""),
        (5, "name", "bytes", ""),
        (6, "size", "uint64", ""),
        (7, "file", "bytes", ""),
        (8, "signal", "uint32", ""),
    ],
    "Attach": [
        (1, "session", "bytes", ""),
        (2, "user", "bytes", ""),
        (3, "mode", "int32", ""),
        (4, "since", "uint64", ""),
        (5, "tail", "uint32", ""),
        (6, "steal", "bool", ""),
        (7, "closes", "bool", ""),
        (8, "rows", "int32", ""),
        (9, "cols", "int32", ""),
    ],
    "PositionMessage": [(1, "offset", "uint64", ""), (2, "dropped", "uint64", ""), (3, "has_pty", "bool", "")],
    "Forward": [
        (1, "connect", "bytes", ""),
        (2, "listen", "bytes", ""),
        (3, "back", "bytes", ""),
        (4, "token", "bytes", ""),
        (5, "user", "bytes", ""),
        (6, "branches", "bytes", ""),
    ],
    "Ports": [(1, "user", "bytes", "")],
    "SetupConnectionRequest": [
        (1, "target", "string", ""),
        (2, "user", "string", ""),
        (3, "env", "EnvEntry", "*"),
        (4, "command", "string", ""),
        (5, "argv", "string", "*"),
        (6, "window_rows", "int32", ""),
        (7, "window_cols", "int32", ""),
        (8, "nopty", "bool", ""),
        (9, "cwd", "string", ""),
        (10, "cwd_pid", "int32", ""),
        (VENDOR, "extended", "Extended", ""),
        (VENDOR + 1, "forward", "Forward", ""),
        (VENDOR + 2, "freeze", "Freeze", ""),
        (VENDOR + 3, "thaw", "Thaw", ""),
        (VENDOR + 4, "clock", "Clock", ""),
        (VENDOR + 5, "subsystem", "Subsystem", ""),
        (VENDOR + 6, "lasting", "Lasting", ""),
        (VENDOR + 7, "attach", "Attach", ""),
        (VENDOR + 8, "window_xpixels", "uint32", ""),
        (VENDOR + 9, "window_ypixels", "uint32", ""),
        (VENDOR + 10, "power_off", "PowerOff", ""),
        (VENDOR + 11, "keeps_env", "bool", ""),
        (VENDOR + 19, "ports", "Ports", ""),
        (VENDOR + 29, "logs", "Logs", ""),
        (VENDOR + 49, "share", "Share", ""),
        (VENDOR + 39, "cores", "Cores", ""),
        (VENDOR + 40, "units", "Units", ""),
    ],
    "SetupConnectionResponse": [
        (1, "status", "int32", ""),
        (2, "description", "string", ""),
        (3, "pid", "int32", ""),
        (VENDOR, "extended", "Extended", ""),
    ],
    "ConnectionStatusMessage": [
        (1, "status", "int32", ""),
        (2, "description", "string", ""),
        (3, "code", "sint32", ""),
        (VENDOR, "signal", "uint32", ""),
        (VENDOR + 1, "core_dumped", "bool", ""),
        (VENDOR + 2, "failure", "Failure", ""),
    ],
    "DataMessage": [(1, "stream", "int32", ""), (2, "data", "bytes", "")],
    "WindowResizeMessage": [
        (1, "rows", "int32", ""),
        (2, "cols", "int32", ""),
        (VENDOR, "xpixels", "uint32", ""),
        (VENDOR + 1, "ypixels", "uint32", ""),
    ],
    "CreditMessage": [(1, "stream", "int32", ""), (2, "bytes", "uint32", "")],
    "HostMessage": [
        (1, "data_message", "DataMessage", "o"),
        (2, "status_message", "ConnectionStatusMessage", "o"),
        (VENDOR, "credit", "CreditMessage", "o"),
        (VENDOR + 1, "close_stream", "int32", "o"),
        (VENDOR + 2, "alive", "bool", "o"),
        (VENDOR + 6, "started", "SetupConnectionResponse", "o"),
        (VENDOR + 7, "proof", "bytes", "o"),
        (VENDOR + 8, "position", "PositionMessage", "o"),
    ],
    "GuestMessage": [
        (1, "data_message", "DataMessage", "o"),
        (2, "status_message", "ConnectionStatusMessage", "o"),
        (3, "resize_message", "WindowResizeMessage", "o"),
        (4, "signal", "int32", "o"),
        (VENDOR, "credit", "CreditMessage", "o"),
        (VENDOR + 1, "close_stream", "int32", "o"),
        (VENDOR + 2, "alive", "bool", "o"),
        (VENDOR + 3, "hold", "bool", "o"),
        (VENDOR + 4, "signal_number", "uint32", "o"),
        (VENDOR + 5, "request_chunk", "bytes", "o"),
        (VENDOR + 7, "proof", "bytes", "o"),
    ],
}


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="vsh_test.proto", package="vsh_test", syntax="proto3")
    for name, rows in MESSAGES.items():
        message = file.message_type.add(name=name)
        if name == "SetupConnectionRequest":
            entry = message.nested_type.add(name="EnvEntry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, type=9, label=1)
            entry.field.add(name="value", number=2, type=9, label=1)
        for number, field_name, kind, flags in rows:
            field = message.field.add(name=field_name, number=number, label=3 if "*" in flags else 1)
            if kind in _TYPES:
                field.type = _TYPES[kind]
            else:
                field.type = 11
                scope = ".vsh_test.SetupConnectionRequest." if kind == "EnvEntry" else ".vsh_test."
                field.type_name = scope + kind
            if "o" in flags:
                if not message.oneof_decl:
                    message.oneof_decl.add(name="msg")
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"vsh_test.{name}")) for name in MESSAGES}


CLASSES = _build()
