"""Runs in the guest: a small server on TCP port 8080 that prints a line when it is ready, and one for each request."""

import socket

with socket.create_server(("127.0.0.1", 8080)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            words = connection.recv(4096).decode().split()
            print("request", words[1], flush=True)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello from the guest\n")
