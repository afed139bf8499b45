"""Push: a publication becomes one commit on the Hub; the only file that writes there.

Large files are sent first, into the repository's store, where no branch shows them. The branch then
moves once, from what it held to the whole model, or not at all. A push that was cut off can be
given again: what is in the store is not sent twice.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from llmprune.disclosure import hide_secrets, refuse_secrets, without_paths
from llmprune.downloads import one_line
from llmprune.errors import InputError
from llmprune.publication import RUN_FOLDER, Publication, Upload, is_model_file

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger("llmprune")

CARD = "README.md"
MAIN = "main"
# A call that is refused for the moment is made so often, and waits so long at most, before the
# user is asked to come back later.
TRIES = 4
LONGEST_WAIT_S = 120.0
AGAIN = "give the command again, what is there is not sent twice"

Answer = TypeVar("Answer")
WriteCard = Callable[["ModelCardData | None"], str]


@dataclass(frozen=True)
class Target:
    """Where a push goes: `revision` is a branch, made where there is none; None is main."""

    repo: str
    revision: str | None = None
    private: bool = False
    create_pr: bool = False
    message: str = "Upload a pruned model"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise InputError(f"REPO must be owner/name, got {self.repo}")
        if self.create_pr and self.revision not in (None, MAIN):
            raise InputError(
                f"--create-pr asks for a change of {MAIN}, got --revision {self.revision}; leave "
                "one of them out"
            )
        if not self.message.strip():
            raise InputError("--message must not be empty")

    @property
    def branch(self) -> str:
        """The branch that moves, or that the pull request is against."""
        return self.revision or MAIN


@dataclass(frozen=True)
class Pushed:
    """Where the model is now: the page of the commit or pull request, and the commit's id.

    `changed` is False where the Hub held exactly this already.
    """

    url: str
    commit: str
    changed: bool


def push(publication: Publication, target: Target, write_card: WriteCard) -> Pushed:
    """Publish a verified run; makes the repository and the branch where there are none.

    Args:
        publication: What goes up.
        target: Where.
        write_card: From the metadata of the dense model's card (None where it can't be read) to
            the card's text.

    Raises:
        InputError: No token, no rights, a name that is taken by a public repository where a
            private one is wanted, a branch that moved meanwhile, a Hub that can't be reached or
            doesn't serve, a file that changed meanwhile. The branch is then as it was.
    """
    token = known_token()
    if token is None:
        raise InputError(
            "a push needs an access token of the Hub; `hf auth login` once, or set HF_TOKEN"
        )
    if target.repo == publication.dense_id:
        raise InputError(
            f"{target.repo}: is the dense model's own repository; name another for the pruned one"
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="llmprune")
    with _explained(target, token):
        head = _open_repository(api, target)
        card = write_card(read_card(publication.dense_id, token))
        uploads = (*publication.uploads, card_upload(card, token))
        return _send(api, publication, target, uploads, head)


def known_token() -> str | None:
    """The user's access token, from the environment or `hf auth login`."""
    from huggingface_hub import get_token

    return get_token()


def card_upload(card: str, token: str | None = None) -> Upload:
    """The model card as a file, without paths of this machine.

    Raises:
        InputError: It holds an access token (by way of a prompt, say).
    """
    refuse_secrets(card, CARD, token)
    return Upload(CARD, without_paths(card).encode())


def read_card(dense_id: str | None, token: str | None) -> ModelCardData | None:
    """Metadata of the dense model's card; None, and a warning, where it can't be read."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HTTPError

    if dense_id is None:
        return None
    try:
        return ModelCard.load(dense_id, token=token, ignore_metadata_errors=True).data
    except (HTTPError, OSError, ValueError) as error:
        logger.warning(
            "%s: its card can't be read (%s); the new card names no licence",
            dense_id,
            hide_secrets(one_line(error), token).partition(" (Request")[0],
        )
        return None


def _open_repository(api: HfApi, target: Target) -> str | None:
    """Make the repository unless it is there; the commit that the branch (or main) is at."""
    _patiently(lambda: api.create_repo(target.repo, private=target.private or None, exist_ok=True))
    info = _patiently(lambda: api.repo_info(target.repo))
    if target.private and not info.private:
        raise InputError(
            f"{target.repo}: is public already, and --private only makes new repositories; make it "
            "private on its settings page, or name another"
        )
    return _head(api, target.repo, target.branch) or _head(api, target.repo, MAIN)


def _head(api: HfApi, repo: str, branch: str) -> str | None:
    refs = _patiently(lambda: api.list_repo_refs(repo))
    if any(tag.name == branch for tag in refs.tags):
        raise InputError(f"--revision must be a branch, got the tag {branch}; name another")
    return {ref.name: ref.target_commit for ref in refs.branches}.get(branch)


def _send(
    api: HfApi,
    publication: Publication,
    target: Target,
    uploads: tuple[Upload, ...],
    head: str | None,
) -> Pushed:
    """Check the card, fill the store, then move the branch once and look at what is there."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard

    repo, is_new = target.repo, _head(api, target.repo, target.branch) is None
    card = next(upload.content for upload in uploads if upload.path == CARD)
    assert isinstance(card, bytes)
    _patiently(ModelCard(card.decode()).validate)
    there = _files(api, repo, head) if head else {}
    additions = [CommitOperationAdd(upload.path, upload.content) for upload in uploads]
    api.preupload_lfs_files(
        repo,
        additions,
        # a branch is made when all is there to be shown on it
        revision=MAIN if is_new else target.branch,
        create_pr=target.create_pr,
        free_memory=False,
        # what another .gitignore hides would be missing without a word
        gitignore_content="",
    )
    _check_sent(additions, publication)
    if is_new:
        _patiently(
            lambda: api.create_branch(repo, branch=target.branch, revision=head, exist_ok=True)
        )
    stale = _stale(set(there), uploads)
    done = _patiently(
        lambda: api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in stale)],
            commit_message=target.message,
            revision=target.branch,
            create_pr=target.create_pr,
            parent_commit=head,
        ),
        # any other failure leaves open whether the branch has moved
        statuses=(429,),
    )
    _check_kept(_files(api, repo, done.oid), uploads, publication, repo)
    return Pushed(done.pr_url or done.commit_url, done.oid, done.oid != head)


def _files(api: HfApi, repo: str, revision: str) -> dict[str, Any]:
    """Path -> what the Hub says of every file at a commit."""
    from huggingface_hub.hf_api import RepoFile

    tree = _patiently(lambda: list(api.list_repo_tree(repo, revision=revision, recursive=True)))
    return {file.path: file for file in tree if isinstance(file, RepoFile)}


def _stale(there: set[str], uploads: tuple[Upload, ...]) -> list[str]:
    """Files of an earlier push that this one doesn't replace: a model must not mix two."""
    ours = {path for path in there if is_model_file(path) or path.startswith(f"{RUN_FOLDER}/")}
    return sorted(ours - {upload.path for upload in uploads})


def _check_sent(additions: list[CommitOperationAdd], publication: Publication) -> None:
    verified = publication.verification.sha256
    for addition in additions:
        name = addition.path_in_repo
        if name in verified and addition.upload_info.sha256.hex() != verified[name]:
            raise InputError(f"{name}: must stay as it was verified, it changed during the push")


def _check_kept(
    kept: dict[str, Any], uploads: tuple[Upload, ...], publication: Publication, repo: str
) -> None:
    """Check that a commit holds every file, and the weights that were verified."""
    verified = publication.verification.sha256
    for upload in uploads:
        file, sha256 = kept.get(upload.path), verified.get(upload.path)
        is_whole = file is not None and file.size == upload.size
        if file is not None and file.lfs and sha256:
            is_whole = file.lfs.sha256 == sha256
        if not is_whole:
            raise InputError(
                f"{repo}: the Hub must keep every file of the push, {upload.path} is missing or "
                "another; give the command again"
            )


def _patiently(
    call: Callable[[], Answer], statuses: tuple[int, ...] = (429, 500, 502, 503, 504)
) -> Answer:
    """Make a call, and again after the wait that the Hub asks for, a few times."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(TRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            wait_s = _asked_wait_s(error) or 2.0**attempt
            if status not in statuses or attempt == TRIES - 1 or wait_s > LONGEST_WAIT_S:
                raise
            logger.warning("the Hub answers %d; trying again in %.0f s", status, wait_s)
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _asked_wait_s(error: HfHubHTTPError) -> float | None:
    """Seconds that the Hub asks to wait; None where it names none."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else None


@contextmanager
def _explained(target: Target, token: str) -> Iterator[None]:
    """Turn every failure of a push into one line that says what to do, and no secret."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
        return
    except InputError:
        raise
    except RuntimeError as error:
        # an upload's thread hands its error on inside another
        why = _failure(error.__cause__ or error, target)
    except (HTTPError, OSError, KeyError, ValueError) as error:
        # an answer that the client can't read is one of the last two
        why = _failure(error, target)
    # the cause is left out: a server may have put the token, or a signed address, into its answer
    raise InputError(f"{target.repo}: {hide_secrets(why, token)}") from None


def _failure(error: BaseException, target: Target) -> str:
    """What went wrong with a push, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _refusal(error, target)
    if isinstance(error, OfflineModeIsEnabled):
        return "a push needs the network, HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, HTTPError):
        return f"the connection to the Hub broke ({one_line(error)}); {AGAIN}"
    why = one_line(error)
    if isinstance(error, OSError):
        why = error.strerror or why
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return f"this machine's disk is full ({why}); make room, then {AGAIN}"
    return f"the push failed ({why}); {AGAIN}"


def _refusal(error: HfHubHTTPError, target: Target) -> str:
    """What a status code of the Hub means for a push."""
    from huggingface_hub.errors import RevisionNotFoundError

    status = error.response.status_code
    said = " ".join((error.server_message or "").split())[:200]
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has no branch {target.branch} there; name another --revision"
    if error.response.request.method == "PUT":
        return f"the Hub's store did not take a file (status {status}); {AGAIN}"
    known = {
        401: "the Hub doesn't accept the access token (401); `hf auth login` anew, or set HF_TOKEN "
        "to a token with the right to write",
        403: f"this access token may not write there (403: {said}); use a token with the right to "
        "write, another owner, or --create-pr",
        404: "the Hub has no such repository, or none that this access token may see (404); check "
        "the spelling",
        409: f"somebody else is changing the repository (409: {said}); {AGAIN}",
        412: f"{target.branch} has moved since the push began (412); {AGAIN}",
        413: f"a file is larger than the Hub takes (413: {said})",
        429: f"too many requests for now (429); wait {_asked_wait_s(error) or 60:.0f} s, then "
        f"{AGAIN}",
        507: f"the Hub has no room for it (507: {said}); make room there, then {AGAIN}",
    }
    if status in known:
        return known[status]
    if status >= 500:
        return f"the Hub doesn't serve now (status {status}); {AGAIN}"
    return f"the Hub refuses with status {status} ({said})"
