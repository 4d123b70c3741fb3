"""A host for vsock_guest_exec, written from its README alone: an independent peer, of which no line is the product's.

    guest_exec_host.py SOCKET disposable|persistent COMMAND...

Listens at a UNIX socket, takes one connection, sends the commands, and disconnects. Prints `listening` first. For a
persistent guest each command follows two bytes, little-endian, which hold its length.
"""

import socket
import struct
import sys


def main(path: str, mode: str, *commands: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        print("listening", flush=True)
        conn, _ = listener.accept()
    with conn:
        for command in commands:
            message = command.encode()
            if mode == "persistent":
                conn.sendall(struct.pack("<H", len(message)))
            conn.sendall(message)
        if mode == "disposable":
            # The guest leaves by itself.
            conn.recv(1)


main(*sys.argv[1:])
