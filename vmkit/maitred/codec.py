"""gRPC's codec for our messages: grpclib then needs no protobuf. Both sides use it."""

from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

from vshd.wire.errors import RemoteProtocolError
from vshd.wire.proto3 import Message


class Codec(CodecBase):
    """Messages are instances of vshd.wire.proto3.Message; what is no such message is INVALID_ARGUMENT."""

    __content_subtype__ = "proto"

    def encode(self, message: Message, message_type: type[Message]) -> bytes:
        if not isinstance(message, message_type):
            raise TypeError(f"expected {message_type.__name__}, not {type(message).__name__}")
        return message.encode()

    def decode(self, data: bytes, message_type: type[Message]) -> Message:
        message = message_type()
        try:
            message.merge(data)
        except RemoteProtocolError as error:
            raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from error
        return message
