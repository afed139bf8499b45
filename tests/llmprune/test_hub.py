"""Pushing to a loopback Hub with the real client, in this process; one answer wrong at a time."""

from __future__ import annotations

import getpass
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from llmprune import hub, load_pruned
from llmprune.errors import InputError
from llmprune.hub import Target
from tests.llmprune.hub_runs import DENSE, finished_run, front_matter, recipe_of
from tests.llmprune.hub_server import CHANGES, HubServer
from tests.llmprune.hub_store import READER, WRITER, Fault

ROOT = Path(__file__).parents[2]
REPO = "ann/small"


@pytest.fixture
def run(tmp_path: Path, saved_folder: Path) -> Path:
    return finished_run(tmp_path / "run", saved_folder)


def refused(push: Any, *arguments: Any) -> str:
    """The one line of a push that was refused."""
    code, _, lines = push(*arguments)
    assert code == 2, lines
    line = lines[-1]
    assert line.startswith("llmprune: ")
    assert not [line for line in lines if "Traceback" in line or WRITER in line]
    return line.removeprefix("llmprune: ")


def snapshot(server: HubServer, repo: str = REPO) -> dict[str, Any]:
    """Everything that a visitor of a repository sees."""
    if repo not in server.repositories:
        return {}
    seen = server.repositories[repo]
    return {"branches": dict(seen.branches), "pulls": dict(seen.pulls), "tags": dict(seen.tags)}


# what arrives


def test_everything_arrives_in_one_commit(server: HubServer, run: Path, push: Any) -> None:
    code, shown, lines = push(run, REPO, "--message", "half the channels")
    assert (code, lines) == (0, [])
    repository = server.repositories[REPO]
    head = repository.find("main")
    assert len(repository.commits) == 2
    assert head.title == "half the channels"
    assert f"published: {server.url}/{REPO}/commit/{head.oid}" in shown
    files = server.files(REPO)
    for file in (run / "model").iterdir():
        assert files[file.name] == file.read_bytes(), file.name
    for name in ("plan.json", "verification.json", "report.json", "scores.json"):
        assert files[f"llmprune/{name}"] == (run / name).read_bytes()
    assert {"README.md", "llmprune/recipe.yaml", ".gitattributes"} <= set(files)
    assert head.files["model.safetensors"].lfs
    assert not {path for path in files if "gates" in path or "log" in path}
    data = front_matter(files["README.md"].decode())
    assert (data["license"], data["language"], data["base_model"]) == ("apache-2.0", "en", DENSE)
    assert all(seen.had_token for seen in server.requests if "/commit/" in seen.path)


def test_a_second_push_sends_nothing_and_makes_no_commit(
    server: HubServer, run: Path, push: Any
) -> None:
    push(run, REPO)
    before, count = snapshot(server), len(server.requests)
    code, shown, _ = push(run, REPO)
    assert code == 0
    assert "the Hub held exactly this already" in shown
    assert snapshot(server) == before
    again = [seen for seen in server.requests[count:] if seen.method == "PUT"]
    assert not again


def test_a_model_is_never_mixed_with_the_one_before(
    server: HubServer, run: Path, push: Any
) -> None:
    older = {
        "model-00001-of-00002.safetensors": b"a",
        "model.safetensors.index.json": b"{}",
        "modeling_pruned.py": b"",
        "llmprune/priors.json": b"{}",
        "mine.gguf": b"mine",
        "docs/notes.md": b"mine",
    }
    server.create(REPO, older)
    assert push(run, REPO)[0] == 0
    assert len(server.repositories[REPO].commits) == 2
    files = server.files(REPO)
    assert files["mine.gguf"] == files["docs/notes.md"] == b"mine"
    assert not {"model-00001-of-00002.safetensors", "modeling_pruned.py"} & set(files)
    assert not {"model.safetensors.index.json", "llmprune/priors.json"} & set(files)


def test_a_dry_run_talks_to_nobody_and_needs_no_token(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("COLUMNS", "200")
    code, shown, _ = push(run, REPO, "--dry-run")
    assert code == 0
    assert not server.requests
    assert "model.safetensors" in shown
    assert f"{(run / 'model' / 'model.safetensors').stat().st_size:,}" in shown
    assert "llmprune/plan.json" in shown
    assert "gates.safetensors" in shown


def test_a_branch_is_made_and_main_stays(server: HubServer, run: Path, push: Any) -> None:
    server.create(REPO, {"notes.md": b"mine"})
    main = server.repositories[REPO].branches["main"]
    assert push(run, REPO, "--revision", "half")[0] == 0
    branches = server.repositories[REPO].branches
    assert branches["main"] == main
    assert "model.safetensors" in server.files(REPO, "half")
    assert server.files(REPO, "half")["notes.md"] == b"mine"
    # the branch moves on from where it is
    assert push(run, REPO, "--revision", "half", "--message", "x")[0] == 0
    assert server.repositories[REPO].branches["half"] == branches["half"]


def test_a_pull_request_moves_no_branch(server: HubServer, run: Path, push: Any) -> None:
    server.create(REPO, {"notes.md": b"mine"})
    before = server.repositories[REPO].branches["main"]
    code, shown, _ = push(run, REPO, "--create-pr")
    assert code == 0
    assert f"{server.url}/{REPO}/discussions/1" in shown
    assert server.repositories[REPO].branches == {"main": before}
    assert "model.safetensors" in server.files(REPO, "refs/pr/1")


def test_whoever_may_only_read_can_open_a_pull_request(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.create(REPO, {"notes.md": b"mine"})
    monkeypatch.setenv("HF_TOKEN", READER)
    assert push(run, REPO, "--create-pr")[0] == 0
    assert "model.safetensors" in server.files(REPO, "refs/pr/1")


def test_a_private_repository_is_private(server: HubServer, run: Path, push: Any) -> None:
    assert push(run, REPO, "--private")[0] == 0
    assert server.repositories[REPO].private
    assert push(run, "ann/open")[0] == 0
    assert not server.repositories["ann/open"].private


def test_what_should_be_private_is_not_put_into_a_public_repository(
    server: HubServer, run: Path, push: Any
) -> None:
    server.create(REPO, {"notes.md": b"mine"})
    before = snapshot(server)
    assert "is public already" in refused(push, run, REPO, "--private")
    assert snapshot(server) == before
    assert len(server.repositories[REPO].lfs) == 0


def test_nothing_of_this_machine_is_in_any_file(
    server: HubServer,
    tmp_path: Path,
    saved_folder: Path,
    push: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "home" / "annabel"
    text = home / "client-x" / "text.txt"
    text.parent.mkdir(parents=True)
    text.write_text("the cat sat")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "annabel")
    recipe = recipe_of(
        model={"source": str(home / "client-x"), "fallback": str(home / "other.gguf")},
        calibration={"dataset": str(text), "num_rows": 8, "row_length": 16},
        evaluation={
            "speed": None,
            "prompt": f"open {home}/x.txt",
            "perplexity": [{"dataset": str(text)}],
        },
    )
    run = finished_run(
        home / "run", saved_folder, recipe=recipe, verification={"dense_model": "client-x"}
    )
    assert getpass.getuser() == "annabel"
    assert push(run, REPO)[0] == 0
    for path, content in server.files(REPO).items():
        shown = content.decode(errors="replace")
        for secret in ("annabel", str(tmp_path), WRITER, server.url, str(Path.cwd())):
            assert secret not in shown, (path, secret)


# what is refused before anybody is asked


def test_an_unverified_run_is_refused_without_a_request(
    server: HubServer, run: Path, push: Any
) -> None:
    (run / "verification.json").unlink()
    assert "must be verified" in refused(push, run, REPO)
    assert not server.requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small"], "REPO must be owner/name, got small"),
        (["a/b/c"], "REPO must be owner/name, got a/b/c"),
        ([DENSE], "is the dense model's own repository"),
        ([REPO, "--create-pr", "--revision", "x"], "--create-pr asks for a change of main"),
        ([REPO, "--message", " "], "--message must not be empty"),
    ],
)
def test_a_wrong_target_is_refused_without_a_request(
    server: HubServer, run: Path, push: Any, arguments: list[str], message: str
) -> None:
    assert message in refused(push, run, *arguments)
    assert not server.requests


def test_no_token_is_refused_without_a_request(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "`hf auth login` once, or set HF_TOKEN" in refused(push, run, REPO)
    assert not server.requests


def test_a_token_in_the_prompt_is_refused(
    server: HubServer, tmp_path: Path, saved_folder: Path, push: Any
) -> None:
    recipe = recipe_of(evaluation={"speed": None, "prompt": f"my key is {WRITER}"})
    run = finished_run(tmp_path / "run", saved_folder, recipe=recipe)
    assert "must hold no access token" in refused(push, run, REPO)
    assert not server.requests


def test_a_token_in_the_dense_models_card_is_not_published(
    server: HubServer, run: Path, push: Any
) -> None:
    card = f"---\nlicense: other\nlicense_name: {READER}\n---\n# dense\n"
    server.create(DENSE, {"README.md": card.encode()})
    assert "README.md: must hold no access token" in refused(push, run, REPO)
    assert set(server.files(REPO)) == {".gitattributes"}


# one answer wrong at a time

BATCH, PUT, VERIFY = r"POST .*/objects/batch$", r"PUT /lfs/", r"POST /lfs-verify/"
CREATE, PREUPLOAD, COMMIT = r"POST /api/repos/create", r"POST .*/preupload/", r"POST .*/commit/"
BRANCH, INFO, TREE = r"POST .*/branch/", rf"GET /api/models/{REPO}$", r"GET .*/tree/"
ROUTES = (CREATE, INFO, PREUPLOAD, BATCH, PUT, VERIFY, COMMIT, TREE)
MEANT = {
    401: "the Hub doesn't accept the access token (401); `hf auth login` anew",
    403: "this access token may not write there (403: injected)",
    404: "no such repository",
    409: "somebody else is changing the repository",
    412: "main has moved since the push began (412)",
    429: "too many requests for now (429); wait",
    500: "the Hub doesn't serve now (status 500)",
    507: "the Hub has no room for it (507: injected)",
}


def assert_whole_or_as_before(server: HubServer, before: dict[str, Any]) -> None:
    """No branch holds a part of a model."""
    now = snapshot(server)
    if not before:
        assert set(now.get("branches", {})) <= {"main"}
        if now:
            assert set(server.files(REPO)) == {".gitattributes"}
        return
    assert now == before


def assert_a_rerun_succeeds(server: HubServer, run: Path, push: Any) -> None:
    server.faults.clear()
    code, shown, lines = push(run, REPO)
    assert code == 0, lines
    assert "published" in shown
    assert (
        server.files(REPO)["model.safetensors"]
        == (run / "model" / "model.safetensors").read_bytes()
    )


def check_refusal(server: HubServer, run: Path, push: Any, route: str, status: int) -> None:
    """A refusal is one line, publishes nothing, and the same command succeeds when it is over."""
    before = snapshot(server)
    server.faults = [Fault(route, status)]
    if route == CREATE and status in (401, 403) and before:
        # the client looks whether the repository is there, and it is
        assert push(run, REPO)[0] == 0
        return
    line = refused(push, run, REPO)
    if route == PUT:
        assert f"the Hub's store did not take a file (status {status})" in line
    else:
        assert MEANT[status] in line
    assert_whole_or_as_before(server, before)
    assert_a_rerun_succeeds(server, run, push)


@pytest.mark.parametrize(
    ("route", "status"),
    [*((COMMIT, status) for status in MEANT), *((r, 500) for r in (PREUPLOAD, BATCH, PUT, VERIFY))],
)
def test_a_refusal_is_one_line_and_publishes_nothing(
    server: HubServer, run: Path, push: Any, route: str, status: int
) -> None:
    server.create(REPO, {"model.safetensors": b"older", "notes.md": b"mine"})
    check_refusal(server, run, push, route, status)


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_every_refusal_on_every_route_is_one_line_and_publishes_nothing(
    server: HubServer, run: Path, push: Any, route: str, exists: bool
) -> None:
    for status in MEANT:
        if route == CREATE and status == 409:
            # the answer for a repository that is there
            continue
        server.repositories.pop(REPO, None)
        if exists:
            server.create(REPO, {"model.safetensors": b"older", "notes.md": b"mine"})
        check_refusal(server, run, push, route, status)


@pytest.mark.parametrize("route", [CREATE, BATCH, PUT, COMMIT, TREE])
def test_a_refusal_for_the_moment_is_waited_out_as_long_as_the_hub_asks(
    server: HubServer, run: Path, push: Any, slept: list[float], route: str
) -> None:
    server.faults = [Fault(route, 429, last=2, headers={"Retry-After": "7"})]
    assert push(run, REPO)[0] == 0
    # the client's own waits add a second
    assert slept in ([7.0, 7.0], [8.0, 8.0])


@pytest.mark.parametrize("route", [CREATE, COMMIT])
def test_the_number_of_attempts_and_the_wait_are_bounded(
    server: HubServer, run: Path, push: Any, slept: list[float], route: str
) -> None:
    server.faults = [Fault(route, 429, headers={"RateLimit": '"api";r=0;t=9'})]
    assert "wait 9 s" in refused(push, run, REPO)
    assert slept == [9.0] * (hub.TRIES - 1)
    server.faults = [Fault(route, 429, headers={"Retry-After": "3600"})]
    assert "wait 3600 s" in refused(push, run, REPO)
    assert slept == [9.0] * (hub.TRIES - 1)


def test_a_commit_that_may_have_happened_is_not_made_twice(
    server: HubServer, run: Path, push: Any
) -> None:
    server.faults = [Fault(COMMIT, 502, after=True)]
    refused(push, run, REPO)
    assert [fault.seen for fault in server.faults] == [1]
    server.faults.clear()
    code, shown, _ = push(run, REPO)
    assert code == 0
    assert "the Hub held exactly this already" in shown
    assert len(server.repositories[REPO].commits) == 2


@pytest.mark.parametrize(
    ("route", "at_byte"), [(CREATE, 0), (PREUPLOAD, 100), (BATCH, 0), (PUT, 1000), (COMMIT, 100)]
)
def test_a_connection_that_breaks_publishes_nothing(
    server: HubServer, run: Path, push: Any, route: str, at_byte: int
) -> None:
    server.create(REPO, {"model.safetensors": b"older", "notes.md": b"mine"})
    before = snapshot(server)
    server.faults = [Fault(route, at_byte=at_byte)]
    assert "the connection to the Hub broke" in refused(push, run, REPO)
    assert snapshot(server) == before
    assert_a_rerun_succeeds(server, run, push)


def test_a_connection_that_breaks_once_in_the_middle_of_a_file_is_taken_up(
    server: HubServer, run: Path, push: Any
) -> None:
    server.faults = [Fault(PUT, at_byte=1000, last=1)]
    assert push(run, REPO)[0] == 0
    assert "model.safetensors" in server.files(REPO)


def test_a_rerun_does_not_send_again_what_is_there(server: HubServer, run: Path, push: Any) -> None:
    server.faults = [Fault(COMMIT, 500)]
    refused(push, run, REPO)
    server.faults.clear()
    count = len(server.requests)
    assert push(run, REPO)[0] == 0
    assert not [seen for seen in server.requests[count:] if seen.method == "PUT"]


def test_a_wrong_token_is_refused_and_not_shown(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "hf_" + "wrong" * 7
    monkeypatch.setenv("HF_TOKEN", wrong)
    server.faults = [Fault(CREATE, 401, message=f"who is {wrong}?")]
    line = refused(push, run, REPO)
    assert "doesn't accept the access token (401)" in line
    server.faults = [Fault(CREATE, 403, message=f"who is {wrong}?")]
    line = refused(push, run, REPO)
    assert wrong not in line
    assert REPO not in server.repositories


def test_a_token_without_the_right_to_write_is_refused(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "may not write there (403" in refused(push, run, REPO)
    server.create(REPO, {"notes.md": b"mine"})
    assert "may not write there (403" in refused(push, run, REPO)
    assert set(server.files(REPO)) == {"notes.md"}
    assert not server.repositories[REPO].lfs


def test_a_branch_that_moves_meanwhile_is_not_overwritten(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.create(REPO, {"notes.md": b"mine"})
    honest = HfApi.preupload_lfs_files

    def overtaken(api: HfApi, *args: Any, **options: Any) -> None:
        honest(api, *args, **options)
        repository = server.repositories[REPO]
        head = repository.find("main")
        files = {**head.files, "theirs.md": server.store("theirs.md", b"theirs")}
        repository.branches["main"] = repository.add(head.oid, "theirs", files).oid

    monkeypatch.setattr(HfApi, "preupload_lfs_files", overtaken)
    assert "main has moved since the push began (412)" in refused(push, run, REPO)
    assert set(server.files(REPO)) == {"notes.md", "theirs.md"}
    monkeypatch.setattr(HfApi, "preupload_lfs_files", honest)
    assert_a_rerun_succeeds(server, run, push)
    assert "theirs.md" in server.files(REPO)


def test_a_file_that_changes_during_the_push_is_not_published(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = HfApi.create_repo

    def overtaken(api: HfApi, *args: Any, **options: Any) -> Any:
        with (run / "model" / "model.safetensors").open("ab") as file:
            file.write(b" ")
        return honest(api, *args, **options)

    monkeypatch.setattr(HfApi, "create_repo", overtaken)
    assert "changed during the push" in refused(push, run, REPO)
    assert set(server.files(REPO)) == {".gitattributes"}


def test_a_file_that_the_hub_drops_is_told_of(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = CHANGES["file"]

    def forgetful(answer: Any, repository: Any, files: Any, value: Any) -> None:
        if value["path"] != "llmprune/plan.json":
            honest(answer, repository, files, value)

    monkeypatch.setitem(CHANGES, "file", forgetful)
    assert "llmprune/plan.json is missing" in refused(push, run, REPO)


def test_a_hub_out_of_reach_and_offline_mode_are_told_apart(
    server: HubServer, run: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the connection to the Hub broke" in refused(push, run, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(push, run, REPO)


def test_a_revision_that_is_a_tag_is_refused(server: HubServer, run: Path, push: Any) -> None:
    server.create(REPO, {"notes.md": b"mine"})
    server.repositories[REPO].tags["v1"] = server.repositories[REPO].branches["main"]
    assert "must be a branch, got the tag v1" in refused(push, run, REPO, "--revision", "v1")


def test_a_dense_card_that_cannot_be_read_costs_the_licence_and_is_said(
    server: HubServer, run: Path, push: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [Fault(rf"(HEAD|GET) /{DENSE}/resolve", 404)]
    assert push(run, REPO)[0] == 0
    assert "its card can't be read" in caplog.text
    data = ModelCard(server.files(REPO)["README.md"].decode()).data
    assert data.license is None
    assert data.base_model == DENSE


# what was pushed, taken back


@pytest.fixture
def pushed(server: HubServer, run: Path, push: Any) -> Path:
    assert push(run, REPO, "--revision", "half")[0] == 0
    return run


def test_what_was_pushed_is_loaded_by_id_and_revision(server: HubServer, pushed: Path) -> None:
    model, ours = load_pruned(REPO, revision="half"), load_pruned(pushed)
    theirs = dict(model.named_parameters())
    assert all(torch.equal(theirs[name], value) for name, value in ours.named_parameters())
    assert model.name_or_path == model.config.name_or_path == REPO
    commit = server.repositories[REPO].branches["half"]
    assert load_pruned(REPO, revision=commit).config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("ann/absent", None, "the Hub has no such model, or it is private"),
        (REPO, "nope", "the Hub has no revision 'nope'"),
        (REPO, None, r"a model on the Hub must have config.json"),
        ("./absent", None, "no such folder or file"),
    ],
)
def test_what_is_not_there_is_said(
    pushed: Path, repo: str, revision: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_pruned(repo, revision=revision)


def test_a_download_that_breaks_is_said_and_taken_up(server: HubServer, pushed: Path) -> None:
    server.faults = [Fault(rf"GET /{REPO}/resolve/.*/model.safetensors", at_byte=1000)]
    with pytest.raises(InputError, match="the download broke off"):
        load_pruned(REPO, revision="half")
    server.faults.clear()
    assert load_pruned(REPO, revision="half").config.model_type == "llama"


# the shape


def test_only_one_file_writes_to_the_hub() -> None:
    writes = re.compile(
        r"\.(create_(commit|repo|branch|tag)|preupload_lfs_files|push_to_hub"
        r"|upload_(file|folder|large_folder))\("
    )
    found = {
        file.name
        for folder in ("llmprune", "eval", "kernels")
        for file in (ROOT / folder).rglob("*.py")
        if writes.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"hub.py"}


def test_a_target_says_where_it_points() -> None:
    assert Target("a/b").branch == "main"
    assert Target("a/b", revision="x").branch == "x"
    with pytest.raises(InputError):
        Target("a b/c")
