"""The vsh protocol as bytes in and events out (docs/PROTOCOL.md): no sockets, no clock, no files."""
