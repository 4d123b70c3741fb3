"""Unpacks lz4's legacy frame, the one that kernels are packed in (`lz4 -l`): Debian 12's is.

With liblz4, which is wherever apt is: apt needs it, and we need apt. The frame is a magic number and blocks, each with
its packed size before it and 8 MiB when unpacked, the last one less (lz4_Frame_format.md, "Legacy frame").
"""

import ctypes
import struct

from vmkit.errors import BuildError, HostError

LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_LIBRARY = "liblz4.so.1"
_BLOCK_BYTES = 8 << 20


def unpack_lz4(data: bytes, limit_bytes: int) -> bytes:
    """The content of one legacy frame. Raises BuildError when it is broken or larger than limit_bytes."""
    try:
        decompress = ctypes.CDLL(_LIBRARY).LZ4_decompress_safe
    except OSError as error:
        raise HostError(f"cannot load {_LIBRARY}", details=str(error), hint="sudo apt-get install liblz4-1") from error
    room = ctypes.create_string_buffer(_BLOCK_BYTES)
    blocks: list[bytes] = []
    at = len(LZ4_LEGACY_MAGIC)
    while at < len(data):
        if at + 4 > len(data):
            raise BuildError("an lz4 frame ends inside a block's size")
        (packed_bytes,) = struct.unpack_from("<I", data, at)
        block = data[at + 4 : at + 4 + packed_bytes]
        at += 4 + packed_bytes
        unpacked_bytes = decompress(block, room, len(block), _BLOCK_BYTES) if len(block) == packed_bytes else -1
        if unpacked_bytes < 0:
            raise BuildError("an lz4 frame is broken, or cut short")
        blocks.append(room.raw[:unpacked_bytes])
        if len(blocks) * _BLOCK_BYTES > limit_bytes + _BLOCK_BYTES:
            raise BuildError(f"an lz4 frame unpacks to more than {limit_bytes} bytes")
    return b"".join(blocks)
