"""A client made with grpcio: a program of its own, for its threads do not go with a fork.

argv: the server's socket. Standard input: a method of maitred, or a path of another service, and a request in
hexadecimal a line. It prints for each what came
back: the status, and the answer in hexadecimal or the words of the error.
"""

import sys

import grpc

DEADLINE_S = 30.0


def main(server: str) -> None:
    # gRPC gives a UNIX socket's path as :authority, and servers of HTTP/2 may refuse that.
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{server}", options=options) as channel:
        for line in sys.stdin:
            method, _, request = line.strip().partition(" ")
            path = method if method.startswith("/") else f"/vm_tools.Maitred/{method}"
            call = channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
            try:
                print("OK", call(bytes.fromhex(request), timeout=DEADLINE_S).hex(), flush=True)
            except grpc.RpcError as error:
                print(error.code().name, error.details(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
