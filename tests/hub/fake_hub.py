"""A stand-in for the Hugging Face hub on loopback: the endpoints that huggingface_hub, transformers and datasets use, over folders of this machine.

Clients are sent here by HF_ENDPOINT and run their own code: HEAD and GET of files with ETag and commit, trees, paths-info, ranges, uploads with
the LFS protocol. What is behind it (storage by xet, gates, redirects to a CDN, rate limits) is not imitated.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_fake"  # noqa: S105
_API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+?)(?:/(revision|tree|paths-info|preupload|commit|xet-read-token)/(.*))?")
_FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/[^/]+/(.*)")


@contextmanager
def fake_hub(root: Path) -> Iterator["FakeHub"]:
    """Serves root/models/OWNER/NAME and root/datasets/OWNER/NAME until the block ends."""
    hub = FakeHub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(5)


class FakeHub(ThreadingHTTPServer):
    """asked: (method, path) of every request. created: wishes for new repositories. gated: names that nobody may read. commit: of everything."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.asked, self.created, self.gated = root, [], [], set()
        self.commit = "0123456789" * 4
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_PUT(self) -> None:
        self._route("PUT")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((method, path))
        body = self._body()
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._json({"name": "me", "type": "user", "orgs": []} if known else {"error": "Invalid credentials"}, 200 if known else 401)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]})
        elif path.startswith("/blob/"):
            self.server.blobs[path.removeprefix("/blob/")] = body
            self._json({})
        elif found := _API.fullmatch(path):
            self._api(*found.groups(), body)  # type: ignore[arg-type]
        elif found := _FILE.fullmatch(path):
            self._file("datasets" if found[1] else "models", found[2], found[3], method)
        else:
            self._json({"error": f"nothing at {path}"}, 404)

    def _api(self, kind: str, name: str, what: str | None, rest: str | None, body: bytes) -> None:
        folder = self._folder(kind, name)
        if folder is None:
            return
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if what in (None, "revision"):
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            self._json({"id": name, "sha": self.server.commit, "private": False, "gated": False, "tags": [], "siblings": siblings})
        elif what == "tree":
            inside = folder / (rest or "").partition("/")[2]
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            if not inside.is_dir():
                return self._error(404, "EntryNotFound", f"{rest} is not in the repository")
            self._json([_entry(folder, file) for file in sorted(inside.rglob("*") if recursive else inside.glob("*"))])
        elif what == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self._json([_entry(folder, folder / path) for path in asked if (folder / path).exists()])
        elif what == "preupload":
            of = json.loads(body)["files"]
            modes = {each["path"]: "lfs" if each["path"].endswith(".safetensors") else "regular" for each in of}
            self._json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in modes.items()]})
        elif what == "commit":
            self._commit(folder, name, [json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": f"{what} is not imitated"}, 404)

    def _commit(self, folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] in ("file", "lfsFile"):
                content = base64.b64decode(value["content"]) if line["key"] == "file" else self.server.blobs[value["oid"]]
                (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / value["path"]).write_bytes(content)
        oid = self.server.commit
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}", "pullRequestUrl": None})

    def _create(self, wish: Mapping[str, Any]) -> None:
        owner, name = wish.get("organization") or "me", wish["name"]
        if owner != "me":
            return self._error(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        self.server.created.append(dict(wish))
        (self.server.root / "models" / owner / name).mkdir(parents=True, exist_ok=True)
        self._json({"url": f"{self.server.url}/{owner}/{name}", "name": f"{owner}/{name}"})

    def _upload(self, wish: Mapping[str, Any]) -> dict[str, Any]:
        return {"oid": wish["oid"], "size": wish["size"], "actions": {"upload": {"href": f"{self.server.url}/blob/{wish['oid']}"}}}

    def _file(self, kind: str, name: str, path: str, method: str) -> None:
        folder = self._folder(kind, name)
        if folder is None:
            return
        if not (folder / path).is_file():
            return self._error(404, "EntryNotFound", f"{path} is not in the repository")
        content = (folder / path).read_bytes()
        said = {"X-Repo-Commit": self.server.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, content, said, method)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        part = content[first : last + 1]
        self._send(206, part, said | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}, method)

    def _folder(self, kind: str, name: str) -> Path | None:
        folder = self.server.root / kind / name
        if name in self.server.gated:
            self._error(403, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted. You must have access to it and be authenticated")
        elif not folder.is_dir():
            self._error(401, "RepoNotFound", "Repository not found")
        else:
            return folder
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message}, self.command)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, self.command)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], method: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(content)


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(), "size": 0}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()}
