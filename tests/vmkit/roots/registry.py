"""A registry on loopback, and a Docker engine on a UNIX socket: each serves one image to those who ask for it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from urllib.parse import unquote, urlparse


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


class _EngineServer(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


@contextmanager
def serve_engine(socket: Path, archive: bytes, name: str, *, is_pulled: bool) -> Iterator[list[str]]:
    """An engine that has the image, or can pull it. Yields the paths that were asked for, without versions."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            asked.append(path.partition("/images")[2])
            if path.endswith("/version"):
                return self._answer(b'{"ApiVersion": "1.41", "MinAPIVersion": "1.24"}')
            if path.endswith("/images/json"):
                return self._answer(json.dumps([{"Id": "x"}] if is_pulled else []).encode())
            is_known = path.endswith(f"/images/{name}/get")
            return self._answer(archive if is_known else b'{"message": "no such image"}', 200 if is_known else 404)

        def do_POST(self) -> None:
            asked.append(unquote(self.path).partition("/images")[2])
            self._answer(b'{"status": "done"}')

        def _answer(self, data: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with _EngineServer(str(socket), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()
