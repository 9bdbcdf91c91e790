"""A model hub on loopback: local folders under hub names, over as much of the hub's HTTP API as loading needs."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree)/[^/]+(?P<path>/.*)?)?")
FILE = re.compile(r"/(datasets/)?(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")
OF_FILES = ("GatedRepo", "EntryNotFound")  # errors that the hub has for files alone: the listing stays public


class Hub:
    """Serves `repositories` (hub name to folder); `answers` (hub name to status and X-Error-Code) come first.

    It is up within a with block. It is also a proxy that reaches nobody: an environment that names it as its proxy
    cannot leave the machine. `asked` holds the requests, and `strangers` those for other hosts.
    """

    def __init__(self, repositories: dict[str, Path], answers: dict[str, tuple[int, str]] | None = None):
        self.repositories, self.answers = repositories, answers or {}
        self.asked: list[str] = []
        self.strangers: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    cut = False
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if asked.netloc and f"http://{asked.netloc}" != self.hub.address or self.command == "CONNECT":
            self.hub.strangers.append(self.path)
            return self.answer(404)
        self.hub.asked.append(f"{self.command} {asked.path}")
        found = API.fullmatch(asked.path) or FILE.fullmatch(asked.path)
        if not found:
            return self.answer(404)
        name, folder = found["name"], self.hub.repositories.get(found["name"])
        status, code = self.hub.answers.get(name, (200, ""))
        if code == "off":  # the hub is gone from now on
            self.close_connection = True
            return self.hub.__exit__()
        self.cut = code == "cut" and found.re is FILE
        if status != 200 and (found.re is FILE or code not in OF_FILES):
            return self.answer(status, code=code)
        files = [file for file in folder.rglob("*") if file.is_file()]
        contents = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
        commit = _hash(b"".join(path.encode() + contents[path] for path in sorted(contents)))
        path = unquote(found["path"] or "").strip("/")
        if found.re is FILE:
            if path not in contents:
                return self.answer(404, code="EntryNotFound", headers={"X-Repo-Commit": commit})
            return self.answer(200, contents[path], headers={"X-Repo-Commit": commit, "ETag": _hash(contents[path])})
        if found["what"] == "tree":
            entries = _entries(contents, path)
            return self.answer(200, entries) if entries else self.answer(404, code="EntryNotFound")
        siblings = [{"rfilename": path} for path in contents]
        self.answer(200, {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})

    do_HEAD = do_CONNECT = do_GET

    def answer(self, status: int, content: object = b"", code: str = "", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        errors = {"X-Error-Code": code, "X-Error-Message": f"{code} (by the tests' hub)"} if code else {}
        for header, value in {"Content-Length": str(len(body)), **errors, **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        self.close_connection = self.cut

    def log_message(self, *_: object) -> None:
        pass


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entries(contents: dict[str, bytes], folder: str) -> list[dict]:
    """The files and folders that lie in `folder`."""
    prefix, entries = f"{folder}/" if folder else "", {}
    for path, content in contents.items():
        if path.startswith(prefix):
            name, _, below = path.removeprefix(prefix).partition("/")
            kind = "directory" if below else "file"
            entries[name] = {"type": kind, "path": prefix + name, "oid": _hash(content), "size": len(content)}
    return list(entries.values())
