"""A model hub on the loopback interface: what `huggingface_hub` asks to create, fill and read one.

Repositories are branches of commits, as on the real one: what has been uploaded is in no revision
until a commit names it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_secret"
LFS_FROM = 10_000
"""Size in bytes from which this hub wants files uploaded apart from the commit."""


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    text: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]

    def commits(self, revision: str) -> list[Commit]:
        """The history that a branch or a commit's id leads to; empty if there is none."""
        if revision in self.branches:
            return self.branches[revision]
        for history in self.branches.values():
            for number, commit in enumerate(history):
                if commit.id == revision:
                    return history[: number + 1]
        return []

    def add(self, branch: str, title: str, text: str, files: dict[str, bytes]) -> Commit:
        history = self.branches.setdefault(branch, [])
        seed = f"{branch} {len(history)} {title} {sorted(files)}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, text, files)
        history.append(commit)
        return commit


@dataclass
class Hub:
    """The state of the server, and what it was asked.

    Attributes:
        refuse: what to answer to a request, by its method and path; None: answer it.
        full: what to say of every file that is to be uploaded; empty: there is room.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refuse: Callable[[str], tuple[int, str] | None] = lambda _: None
    full: str = ""

    def new(self, name: str, *, private: bool = True, **files: bytes) -> Repo:
        """Create a repository, with a file that the real hub writes as well."""
        repo = self.repos[name] = Repo(private, {})
        repo.add("main", "initial commit", "", {".gitattributes": b"*.safetensors lfs\n"} | files)
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, without the hub's own."""
        files = dict(self.repos[name].commits(revision)[-1].files)
        del files[".gitattributes"]
        return files

    def titles(self, name: str, branch: str = "main") -> list[str]:
        """The messages of all commits after the first."""
        return [commit.title for commit in self.repos[name].branches[branch][1:]]


class _RefusedError(Exception):
    def __init__(self, status: int, said: str, code: str = "") -> None:
        super().__init__(said)
        self.status, self.said, self.code = status, said, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: otherwise the second waits for an acknowledgement, for 40 ms.
    wbufsize = -1

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        asked = f"{self.command} {unquote(path)}"
        self.hub.asked.append(asked)
        try:
            if refusal := self.hub.refuse(asked):
                raise _RefusedError(*refusal)
            # What is uploaded goes to signed addresses, which take no token.
            if not path.startswith("/upload/"):
                self._require_token()
            for methods, pattern, answer in _ROUTES:
                if self.command in methods and (found := re.fullmatch(pattern, path)):
                    return answer(self, *map(unquote, found.groups()))
            raise _RefusedError(404, f"no route {asked}")
        except _RefusedError as refused:
            headers = {"X-Error-Message": refused.said, "X-Error-Code": refused.code}
            self._send(refused.status, {"error": refused.said}, headers)

    def _require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _RefusedError(401, "Invalid credentials in Authorization header")

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            if text:
                self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self) -> Any:
        return json.loads(self.body)

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[name]

    def _commit(self, name: str, revision: str) -> Commit:
        history = self._repo(name).commits(revision)
        if not history:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return history[-1]

    def create(self) -> None:
        asked = self._json()
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "org":
            raise _RefusedError(403, "You don't have the rights to create a model there")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.new(name, private=private)
        self._send(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str = "main") -> None:
        commit = self._commit(name, revision)
        self._send(200, {"id": name, "private": self._repo(name).private, "sha": commit.id})

    def tree(self, name: str, revision: str) -> None:
        files = self._commit(name, revision).files
        self._send(200, [_listed(path, data) for path, data in sorted(files.items())])

    def branch(self, name: str, branch: str) -> None:
        history = self._repo(name).commits(self._json()["startingPoint"])
        self._repo(name).branches[branch] = list(history)
        self._send(200, {})

    def validate(self) -> None:
        head = self._json()["content"].split("---\n")[1]
        if "model-index" in yaml.safe_load(head) and "name:" not in head:
            raise _RefusedError(400, "model-index needs a name")
        said = [{"message": text} for text in self.hub.warnings]
        self._send(200, {"errors": [], "warnings": said})

    def preupload(self, name: str, revision: str) -> None:
        there = self._commit(name, revision).files
        asked, answers = self._json(), []
        # This hub takes any rules for rules against everything.
        ignored = bool(asked.get("gitIgnore", there.get(".gitignore")))
        for file in asked["files"]:
            path = file["path"]
            listed = _listed(path, there[path]) if path in there else {}
            mode = "lfs" if file["size"] >= LFS_FROM else "regular"
            oid = listed.get("lfs", listed).get("oid")
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self._send(200, {"files": answers})

    def batch(self, name: str) -> None:
        self._repo(name)
        objects = []
        for wanted in self._json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if self.hub.full:
                answer["error"] = {"code": 403, "message": self.hub.full}
            elif wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/upload/{wanted['oid']}"
                verify = {"href": f"{self.hub.url}/{name}/verify"}
                answer["actions"] = {"upload": {"href": href}, "verify": verify}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, "another digest")
        self.hub.objects[oid] = self.body
        self._send(200, {})

    def verify(self, name: str) -> None:
        self._send(200 if self._json()["oid"] in self.hub.objects else 404, {})

    def commit(self, name: str, branch: str) -> None:
        now = self._commit(name, branch)
        header, *lines = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit", now.id) != now.id:
            raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(now.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        said = header["value"]
        commit = self._repo(name).add(branch, said["summary"], said["description"], files)
        url = f"{self.hub.url}/{name}/commit/{commit.id}"
        self._send(200, {"commitUrl": url, "commitOid": commit.id, "pullRequestUrl": None})

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(name, revision)
        if path not in commit.files:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        etag = f'"{_git(data)}"'
        self._send(200, data, {"ETag": etag, "X-Repo-Commit": commit.id})


_NAME = "/([^/]+/[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), f"/api/models{_NAME}", _Handler.info),
    (("GET",), f"/api/models{_NAME}/revision/([^/]+)", _Handler.info),
    (("GET",), f"/api/models{_NAME}/tree/([^/]+)", _Handler.tree),
    (("POST",), f"/api/models{_NAME}/branch/([^/]+)", _Handler.branch),
    (("POST",), f"/api/models{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), f"/api/models{_NAME}/commit/([^/]+)", _Handler.commit),
    (("POST",), f"{_NAME}.git/info/lfs/objects/batch", _Handler.batch),
    (("POST",), f"{_NAME}/verify", _Handler.verify),
    (("PUT",), "/upload/([0-9a-f]+)", _Handler.upload),
    (("GET", "HEAD"), f"{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _listed(path: str, data: bytes) -> dict[str, Any]:
    listed = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if len(data) >= LFS_FROM:
        digest = hashlib.sha256(data).hexdigest()
        listed["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return listed


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
