"""A Hub on the loopback interface: repositories, an LFS store, and faults on demand.

It answers the routes that huggingface_hub's client uses to create a repository, to commit and to
download, with the status codes that the Hub gives. Everything is in memory. Files are stored by
content: the key of a blob is the sha256 of its bytes, and a body that does not match is refused.
A client must see `environment()` before it imports huggingface_hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.llmprune.hub_store import (
    LFS_SUFFIXES,
    USERS,
    WRITER,
    Commit,
    Entry,
    Fault,
    HubError,
    Repository,
    Seen,
    git_oid,
)


class HubServer(ThreadingHTTPServer):
    """The Hub; `with HubServer() as hub:` serves until the block ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.lock = threading.Lock()
        self.blobs: dict[str, bytes] = {}
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Seen] = []

    def __enter__(self) -> HubServer:
        # polled often, because shutdown waits for the next poll
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """What a client's process must have in its environment; `home` holds its caches."""
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return settings | ({"HF_TOKEN": token} if token else {})

    def create(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> Repository:
        """Make a repository as its owner would, with these files in its one branch."""
        repository = self.repositories[name] = Repository(name.partition("/")[0], private)
        entries = {path: self.store(path, content) for path, content in files.items()}
        repository.lfs |= {entry.sha256 for entry in entries.values() if entry.lfs}
        repository.branches["main"] = repository.add(None, "initial", entries).oid
        return repository

    def create_from(self, name: str, folder: Path) -> Repository:
        """The same with the files of a folder."""
        return self.create(name, {file.name: file.read_bytes() for file in folder.iterdir()})

    def store(self, path: str, content: bytes) -> Entry:
        """Keep a file's bytes under their hash."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return Entry(sha256, len(content), path.endswith(LFS_SUFFIXES))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, by path."""
        commit = self.repositories[name].find(revision)
        assert commit is not None, revision
        return {path: self.blobs[entry.sha256] for path, entry in commit.files.items()}

    def fault_for(self, method: str, path: str) -> Fault | None:
        """What is wrong with this request, if anything."""
        return next((fault for fault in self.faults if fault.strikes(f"{method} {path}")), None)


REPO = r"(?P<repo>[^/]+/[^/]+)"


class Answer(BaseHTTPRequestHandler):
    """One connection of a client."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    # an answer in one packet: in two, each waits 40 ms for the client's word that the first came
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        """Keep the test's output quiet."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        split = urlsplit(self.path)
        path, self.query = split.path, parse_qs(split.query)
        with self.server.lock:
            fault = self.server.fault_for(self.command, path)
        try:
            if fault and fault.hold:
                fault.hold.wait(60)
            elif fault and fault.status is None and fault.at_byte is not None:
                self._hang_up_after(fault.at_byte, path)
                return
            self.body = self._read_body()
            if fault and fault.status and not fault.after:
                raise HubError(fault.status, fault.message)
            with self.server.lock:
                status, content, headers = self._route(path)
            if fault and fault.after:
                if fault.status is None:
                    self._close(path)
                    return
                raise HubError(fault.status, fault.message)
        except HubError as error:
            status = error.status
            content = json.dumps({"error": error.message, **error.more}).encode()
            headers = {"X-Error-Message": error.message, "Content-Type": "application/json"}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            headers |= dict(fault.headers) if fault else {}
        self._note(path, status)
        self._send(status, content, headers)

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return b""
        return b"".join(self._chunks())

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _hang_up_after(self, count: int, path: str) -> None:
        if self.command == "GET":
            with self.server.lock:
                status, content, headers = self._route(path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[:count])
            self.wfile.flush()
        else:
            self.rfile.read(min(count, int(self.headers.get("Content-Length", count))))
        self._close(path)

    def _close(self, path: str) -> None:
        self._note(path, None)
        # a reset, as when a cable is pulled
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _note(self, path: str, status: int | None) -> None:
        had_token = "Authorization" in self.headers
        with self.server.lock:
            self.server.requests.append(Seen(self.command, path, self._user(), had_token, status))

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # who asks, and for what

    def _user(self) -> str | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _authorized(self) -> str:
        user = self._user()
        if user is None and "Authorization" in self.headers:
            raise HubError(401, "Invalid credentials in Authorization header")
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

    def _repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self._user() != repository.owner):
            raise HubError(404 if self._user() else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, name: str) -> Repository:
        self._authorized()
        repository = self._repository(name)
        if self._user() != repository.owner and "create_pr" not in self.query:
            raise HubError(403, "You don't have the rights to write to this repository")
        return repository

    @staticmethod
    def _at(repository: Repository, revision: str) -> Commit:
        commit = repository.find(unquote(revision))
        if commit is None:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        return commit

    def _route(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                found = answer(self, **match.groupdict())
                if isinstance(found, tuple):
                    return found
                return 200, json.dumps(found).encode(), {"Content-Type": "application/json"}
        raise HubError(404, "Not found")

    # the routes

    def whoami(self) -> Any:
        user = self._authorized()
        role = "write" if user == "ann" else "read"
        return {"name": user, "type": "user", "auth": {"accessToken": {"role": role}}, "orgs": []}

    def create_repo(self) -> Any:
        user, wish = self._authorized(), json.loads(self.body)
        owner = wish.get("organization") or user
        name = f"{owner}/{wish['name']}"
        if name in self.server.repositories:
            url = f"{self.server.url}/{name}"
            raise HubError(409, "You already created this model repo", url=url)
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a model under {owner}")
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        private = wish.get("visibility") == "private" or wish.get("private") is True
        self.server.create(name, {".gitattributes": attributes}, private=private)
        return {"url": f"{self.server.url}/{name}"}

    def validate_yaml(self) -> Any:
        content = json.loads(self.body)["content"]
        if not re.match(r"---\n.*?\n---\n", content, re.DOTALL):
            raise HubError(400, "a card must begin with metadata")
        return {"errors": [], "warnings": []}

    def info(self, repo: str, rev: str = "main") -> Any:
        repository = self._repository(repo)
        commit = self._at(repository, rev)
        return {
            "id": repo,
            "sha": commit.oid,
            "private": repository.private,
            "siblings": [{"rfilename": path} for path in commit.files],
        }

    def refs(self, repo: str) -> Any:
        repository = self._repository(repo)

        def listed(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": c} for n, c in names.items()]

        found = {"branches": listed(repository.branches, "refs/heads/"), "converts": []}
        found |= {"tags": listed(repository.tags, "refs/tags/")}
        return found | {"pullRequests": listed(repository.pulls, "")}

    def tree(self, repo: str, rev: str) -> Any:
        commit = self._at(self._repository(repo), rev)
        return [self._listed(path, entry) for path, entry in sorted(commit.files.items())]

    def _listed(self, path: str, entry: Entry) -> dict[str, Any]:
        oid = git_oid(self.server.blobs[entry.sha256])
        listed = {"type": "file", "path": path, "size": entry.size, "oid": oid}
        if entry.lfs:
            listed["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
        return listed

    def branch(self, repo: str, name: str) -> Any:
        repository, name = self._writable(repo), unquote(name)
        if name in repository.branches:
            raise HubError(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[name] = self._at(repository, start).oid
        return {}

    def tag(self, repo: str, rev: str) -> Any:
        repository, name = self._writable(repo), json.loads(self.body)["tag"]
        if name in repository.tags:
            raise HubError(409, "Tag reference exists already")
        repository.tags[name] = self._at(repository, rev).oid
        return {}

    def preupload(self, repo: str, rev: str) -> Any:
        commit = self._at(self._writable(repo), rev)
        answers = []
        for wish in json.loads(self.body)["files"]:
            path = wish["path"]
            lfs = path.endswith(LFS_SUFFIXES) or wish["size"] > 10 * 2**20
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
            answer["shouldIgnore"] = False
            if path in commit.files:
                entry = commit.files[path]
                content = self.server.blobs[entry.sha256]
                answer["oid"] = entry.sha256 if entry.lfs else git_oid(content)
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, repo: str) -> Any:
        self._authorized()
        repository, objects = self._repository(repo), []
        for wish in json.loads(self.body)["objects"]:
            told = {"oid": wish["oid"], "size": wish["size"]}
            if wish["oid"] not in repository.lfs:
                upload = {"href": f"{self.server.url}/lfs/{repo}/{wish['oid']}"}
                verify = {"href": f"{self.server.url}/lfs-verify/{repo}"}
                told["actions"] = {"upload": upload, "verify": verify}
            objects.append(told)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, repo: str, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(422, "the content is not what its hash says")
        self.server.blobs[oid] = self.body
        self.server.repositories[repo].lfs.add(oid)
        return {}

    def lfs_verify(self, repo: str) -> Any:
        if json.loads(self.body)["oid"] not in self.server.repositories[repo].lfs:
            raise HubError(404, "no such object")
        return {}

    def commit(self, repo: str, rev: str) -> Any:
        repository = self._writable(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self._at(repository, rev)
        files = dict(head.files)
        is_pull = "create_pr" in self.query
        if not is_pull and header.get("parentCommit") not in (None, head.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines:
            CHANGES.get(line["key"], _no_change)(self, repository, files, line["value"])
        done = repository.add(head.oid, header["summary"], files)
        answer = {"success": True, "commitOid": done.oid, "hookOutput": ""}
        answer["commitUrl"] = f"{self.server.url}/{repo}/commit/{done.oid}"
        if is_pull:
            number = len(repository.pulls) + 1
            repository.pulls[f"refs/pr/{number}"] = done.oid
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        else:
            if unquote(rev) not in repository.branches:
                raise HubError(404, "Invalid rev id", "RevisionNotFound")
            repository.branches[unquote(rev)] = done.oid
        return answer

    def resolve(self, repo: str, rev: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        commit = self._at(self._repository(repo), rev)
        entry = commit.files.get(unquote(path))
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = self.server.blobs[entry.sha256]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{git_oid(content)}"'}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if entry.lfs:
            headers["X-Linked-Etag"] = headers["ETag"] = f'"{entry.sha256}"'
            headers["X-Linked-Size"] = str(entry.size)
        if self.command == "HEAD":
            return 200, b"", headers | {"Content-Length": str(entry.size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, content, headers
        start, end = int(wanted[1]), int(wanted[2] or entry.size - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{entry.size}"
        return 206, content[start : end + 1], headers


def _add_file(answer: Answer, repository: Repository, files: dict[str, Entry], value: Any) -> None:
    entry = answer.server.store(value["path"], base64.b64decode(value["content"]))
    files[value["path"]] = replace(entry, lfs=False)


def _add_lfs(answer: Answer, repository: Repository, files: dict[str, Entry], value: Any) -> None:
    if value["oid"] not in repository.lfs:
        raise HubError(400, "an LFS pointer must point at an uploaded file")
    files[value["path"]] = Entry(value["oid"], value["size"], True)


def _delete(answer: Answer, repository: Repository, files: dict[str, Entry], value: Any) -> None:
    if files.pop(value["path"], None) is None:
        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")


def _no_change(*args: object) -> None:
    """The header of a commit changes no file."""


CHANGES: dict[str, Callable[..., None]] = {
    "file": _add_file,
    "lfsFile": _add_lfs,
    "deletedFile": _delete,
}

ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", Answer.whoami),
    ("POST", "/api/repos/create", Answer.create_repo),
    ("POST", "/api/validate-yaml", Answer.validate_yaml),
    ("GET", f"/api/models/{REPO}", Answer.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<rev>.+)", Answer.info),
    ("GET", f"/api/models/{REPO}/refs", Answer.refs),
    ("GET", f"/api/models/{REPO}/tree/(?P<rev>[^/]+)", Answer.tree),
    ("POST", f"/api/models/{REPO}/branch/(?P<name>[^/]+)", Answer.branch),
    ("POST", f"/api/models/{REPO}/tag/(?P<rev>[^/]+)", Answer.tag),
    ("POST", f"/api/models/{REPO}/preupload/(?P<rev>[^/]+)", Answer.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<rev>[^/]+)", Answer.commit),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Answer.lfs_batch),
    ("PUT", f"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})", Answer.lfs_put),
    ("POST", f"/lfs-verify/{REPO}", Answer.lfs_verify),
    ("GET", f"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Answer.resolve),
]
