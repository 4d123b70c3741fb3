#!/usr/bin/env python3
"""Starts a server in a machine, follows its output, tests it, and stops it with a signal."""

from pathlib import Path

import vmkit

SERVICE = Path(__file__).with_name("service.py")

with vmkit.Machine("tiny") as machine:
    machine.push(str(SERVICE), "/root/service.py")
    with machine.popen(["python3", "/root/service.py"], stderr=vmkit.STDOUT, text=True) as server:
        assert server.stdout
        # Read line by line: the server runs on, so there is no end to wait for.
        for line in server.stdout:
            print("server:", line.strip())
            if line == "ready\n":
                break

        for path in ("/one", "/two"):
            reply = machine.run(["wget", "-q", "-O", "-", f"http://127.0.0.1:8080{path}"], text=True, check=True)
            print("client:", reply.stdout.strip())
            print("server:", server.stdout.readline().strip())

        server.terminate()
        server.wait(timeout=10)
    print("the server was ended by signal", server.signal)
