"""A hub on this machine: `with serve(folder) as url` gives the files of `folder`/<owner>/<name>/ as models."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(ThreadingHTTPServer):
    """`asked`: (method, path, Authorization header) of every request. `cut`: bytes after which the next
    transfer of weights breaks off, 0 for none."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked, self.cut = root, [], 0


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/main)?", path):
            folder = self.server.root / found[1]
            if not folder.is_dir():
                return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            info = {"id": found[1], "sha": "a" * 40, "siblings": [{"rfilename": name} for name in names]}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), body)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/\w+(?:/)?", path):
            folder = self.server.root / found[1]
            entries = [
                {
                    "type": "file",
                    "path": p.relative_to(folder).as_posix(),
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in sorted(folder.rglob("*"))
                if p.is_file()
            ]
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(entries).encode(), body)
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path):
            file = self.server.root / found[1] / found[2]
            if not file.is_file():
                return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            content = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "a" * 40}
            return self.send(200, headers, content, body)
        missing = "RevisionNotFound" if "/revision/" in path else "RepoNotFound"
        return self.send(404, {"X-Error-Code": missing}, b"", body)

    def send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if self.server.cut and self.path.endswith(".safetensors"):
            self.wfile.write(content[: self.server.cut])
            self.server.cut, self.close_connection = 0, True
            return
        self.wfile.write(content)


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, Hub]]:
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{hub.server_address[1]}", hub
    finally:
        hub.shutdown()
        hub.server_close()
