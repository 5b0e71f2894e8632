"""A Hugging Face hub of two folders on this machine: what its clients ask for, over real HTTP.

`ROOT/models/<owner>/<name>/` and `ROOT/datasets/<owner>/<name>/` are repositories with one commit
each; every branch name means that commit.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Repository:
    """One folder as a repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
        content = b"".join(name.encode() + self.read(name) for name in self.files)
        self.commit = hashlib.sha1(content).hexdigest()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def entry(self, name: str) -> dict[str, Any]:
        content = self.read(name)
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def tree(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{under}/" if under else ""
        inside = [name for name in self.files if name.startswith(prefix)]
        if recursive:
            return [self.entry(name) for name in inside]
        here = [self.entry(name) for name in inside if "/" not in name[len(prefix) :]]
        folders = {prefix + name[len(prefix) :].split("/")[0] for name in inside}
        return here + [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            for path in sorted(folders - {entry["path"] for entry in here})
        ]

    def info(self, repo: str) -> dict[str, Any]:
        return {
            "id": repo,
            "sha": self.commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": name} for name in self.files],
        }


class FakeHub(ThreadingHTTPServer):
    """The server, with what it was asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self, body: bytes = b"") -> None:
        address = urlsplit(self.path)
        self.server.asked.append(f"{self.command} {address.path}")
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts[0] == "api" and len(parts) >= 4:
            self._api(parts[1], parts[2:], parse_qs(address.query), body)
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if len(parts) >= 5 and parts[2] == "resolve":
            self._file(kind, "/".join(parts[:2]), "/".join(parts[4:]))
            return
        self._error(404, "RepoNotFound")

    def _repository(self, kind: str, repo: str) -> Repository | None:
        folder = self.server.root / kind / repo
        return Repository(folder) if folder.is_dir() else None

    def _api(self, kind: str, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        repo = "/".join(parts[:2])
        found = self._repository(kind, repo)
        if found is None:
            self._error(404, "RepoNotFound")
        elif parts[2:3] in ([], ["revision"]):
            self._json(found.info(repo))
        elif parts[2] == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            entries = found.tree("/".join(parts[4:]), recursive)
            if entries:
                self._json(entries)
            else:
                self._error(404, "EntryNotFound")
        elif parts[2] == "paths-info":
            asked = _paths(body)
            self._json([found.entry(name) for name in asked if name in found.files])
        else:
            self._error(404, "EntryNotFound")

    def _file(self, kind: str, repo: str, name: str) -> None:
        found = self._repository(kind, repo)
        if found is None or name not in found.files:
            self._error(404, "RepoNotFound" if found is None else "EntryNotFound", found)
            return
        content = found.read(name)
        first, last = 0, len(content) - 1
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
        part = content[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", found.commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self._send(part)

    def _json(self, value: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._send(json.dumps(value).encode())

    def _error(self, status: int, code: str, found: Repository | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if found is not None:
            self.send_header("X-Repo-Commit", found.commit)
        self._send(b"{}")

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _paths(body: bytes) -> list[str]:
    """The paths of a paths-info request, which come as a form or as JSON."""
    text = body.decode()
    if text.startswith("{"):
        found: list[str] = json.loads(text)["paths"]
        return found
    return parse_qs(text).get("paths", [])


@contextmanager
def fake_hub(root: Path) -> Iterator[FakeHub]:
    """Serve a folder for as long as the context lasts."""
    hub = FakeHub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
