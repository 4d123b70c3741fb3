"""The vsh protocol as bytes in and events out (docs/reference/protocol.md): no sockets, no clock, no files."""
