"""What a published text must not tell: access tokens, and where things lie on this machine.

Tokens are never taken out quietly: a file that holds one has been somewhere it should not have
been, so it is refused. A path becomes `local:NAME`, which says that there was a file or folder of
that name and nothing about the machine.
"""

from __future__ import annotations

import re
from pathlib import Path

from llmprune.errors import InputError

# Forms that services give their secrets; a word of a vocabulary is shorter.
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    re.compile(r"\bapi_org_[A-Za-z0-9]{20,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)

# A path ends where text, JSON, YAML or Markdown would end it.
_PART = r"[^\s/\\\"'`<>|,;:()\[\]{}]+"
_HOMES = re.compile(
    rf"(?<![\w.~])(?:/(?:home|Users)/{_PART}|/root(?=/)|[A-Za-z]:(?:\\+|/)Users(?:\\+|/){_PART})"
    rf"(?P<rest>(?:(?:\\+|/){_PART})*)[/\\]*"
)
_ABSOLUTE = re.compile(rf"(?<![\w./:~<-])/{_PART}(?P<rest>(?:/{_PART})+)/?")
_TEMPORARY = ("/tmp/", "/var/folders/")
# The same on every machine; a text may speak of them.
_SYSTEM = re.compile(r"/(?:usr|bin|sbin|etc|dev|proc|sys|lib|lib64|boot|run|opt)/")


def without_paths(text: str) -> str:
    """The text with `local:NAME` in place of every path that belongs to a machine.

    Those are paths into somebody's home folder, on any system, into a folder for temporary files,
    and into any folder that is here, but for those of the system.
    """
    text = _HOMES.sub(lambda match: local_name(match["rest"]), text)
    return _ABSOLUTE.sub(lambda match: _unless_elsewhere(match[0], match["rest"]), text)


def refuse_secrets(text: str, name: str, known: str | None = None) -> None:
    """Check that a text holds no access token.

    Args:
        text: What will be published.
        name: Of the file, for the message; the token itself is never shown.
        known: This user's own token, looked for in any form.

    Raises:
        InputError: It does.
    """
    found = [match for pattern in _SECRETS if (match := pattern.search(text))]
    if found or (known and known in text):
        line = text[: found[0].start() if found else text.index(known or "")].count("\n") + 1
        raise InputError(
            f"{name}: must hold no access token, line {line} has what looks like one; take it out, "
            "and revoke the token if others could read the file"
        )


def hide_secrets(text: str, known: str | None = None) -> str:
    """The text with every access token blotted out, for messages."""
    for pattern in _SECRETS:
        text = pattern.sub("(hidden)", text)
    return text.replace(known, "(hidden)") if known else text


def local_name(path: str) -> str:
    """`local:NAME` for a path; of a home folder itself, whose name is the user's, `local:home`."""
    last = re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
    return f"local:{last or 'home'}"


def _unless_elsewhere(found: str, rest: str) -> str:
    top = Path(*Path(found).parts[:3])
    belongs_here = found.startswith(_TEMPORARY) or (top.exists() and not _SYSTEM.match(found))
    return local_name(rest) if belongs_here else found
