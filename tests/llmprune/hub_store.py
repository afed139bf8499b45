"""What a Hub keeps, and what goes wrong on demand; hub_server.py answers with it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

# Two users: one owns `ann/*`, the other may only read.
WRITER, READER = "hf_annAnnAnnAnnAnnAnnAnnAnnAnnAnnAnn", "hf_bobBobBobBobBobBobBobBobBobBobBob"
USERS = {WRITER: "ann", READER: "bob"}

# What the Hub keeps as LFS without being told.
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Entry:
    """A file of a commit: the sha256 of its bytes, and whether it is kept as LFS."""

    sha256: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """All files at one commit, by path."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, Entry]


@dataclass
class Repository:
    """Commits, and the names that point at them."""

    owner: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    # sha256 of the blobs that this repository may point at
    lfs: set[str] = field(default_factory=set)

    def add(self, parent: str | None, title: str, files: Mapping[str, Entry]) -> Commit:
        """A new commit; no name points at it yet."""
        listing = sorted((path, entry.sha256) for path, entry in files.items())
        text = json.dumps([parent, title, listing, len(self.commits)])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, dict(files))
        return self.commits[oid]

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, tag, pull request or (shortened) id."""
        for names in (self.branches, self.tags, self.pulls):
            if revision in names:
                return self.commits[names[revision]]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        return self.commits[found[0]] if found else None


@dataclass
class Fault:
    """What goes wrong: the answers `first` to `last` (from 1) of a route.

    `route` is a regular expression for "METHOD /path". `status` is answered, or the connection is
    closed: with `at_byte`, after so many bytes of the request's body (or of the answer's, for GET).
    `after` lets the request take effect before it goes wrong. With `hold`, nothing goes wrong but
    the answer waits for that event.
    """

    route: str
    status: int | None = None
    first: int = 1
    last: int = 10**6
    at_byte: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "injected"
    after: bool = False
    hold: threading.Event | None = None
    seen: int = 0

    def strikes(self, request: str) -> bool:
        """Whether this request, "METHOD /path", is to go wrong; counts it."""
        if not re.search(self.route, request):
            return False
        self.seen += 1
        return self.first <= self.seen <= self.last


@dataclass(frozen=True)
class Seen:
    """A request that was answered; of its token only whose it was."""

    method: str
    path: str
    user: str | None
    had_token: bool
    status: int | None


class HubError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.more = message, more


def git_oid(content: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
