"""A registry on loopback: serves an OCI layout over HTTP to those who pull, and remembers which blobs they fetched."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Registry:
    """The address, and the digests of the layers and documents that were fetched."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.fetched: list[str] = []


@contextmanager
def serve(layout: Path, tag: str) -> Iterator[Registry]:
    """The layout's image `tag` is /v2/NAME/manifests/TAG, whatever the name."""
    (entry,) = (
        one
        for one in json.loads((layout / "index.json").read_text())["manifests"]
        if one["annotations"]["org.opencontainers.image.ref.name"] == tag
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            words = self.path.strip("/").split("/")
            digest = words[-1] if words[-1].startswith("sha256:") else entry["digest"] if words[-1] == tag else ""
            blob = layout / "blobs/sha256" / digest.partition(":")[2]
            data = b"{}" if words == ["v2"] else blob.read_bytes() if digest and blob.exists() else b""
            if "blobs" in words:
                registry.fetched.append(digest)
            self.send_response(200 if data else 404)
            kind = entry["mediaType"] if "manifests" in words else "application/octet-stream"
            self.send_header("Content-Type", kind)
            self.send_header("Docker-Content-Digest", digest)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        registry = Registry(f"127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
