"""From a model on the Hub to a smaller one there and back, every step a process of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune import load_pruned
from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe
from tests.llmprune.hub_runs import front_matter
from tests.llmprune.hub_server import HubServer
from tests.llmprune.hub_store import WRITER, Fault

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROMPT = [3, 4, 5]
GENERATE = """
import json, sys
model = load(sys.argv[1])
import torch
tokens = model.generate(torch.tensor([json.loads(sys.argv[2])]), max_new_tokens=12, do_sample=False)
print(json.dumps(tokens[0].tolist()))
"""
STOCK = (
    "from transformers import AutoModelForCausalLM\nload = AutoModelForCausalLM.from_pretrained\n"
)
REMOTE = """
from functools import partial
from transformers import AutoModelForCausalLM
load = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
"""
BLOCKS = """
from functools import partial
from llmprune import load_pruned
load = partial(load_pruned, block_sparse=True)
"""
OURS = "from llmprune import load_pruned as load\n"


@dataclass
class Client:
    """A machine of its own: a home, caches and a token."""

    server: HubServer
    home: Path

    def environment(self, *, fresh: Path | None = None, ours: bool = True) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
        settings = {"HOME": str(self.home), "USER": "annabel", "OMP_NUM_THREADS": "1"}
        settings |= {"ACCELERATE_USE_CPU": "true", "TMPDIR": str(self.home)}
        if ours:
            settings["PYTHONPATH"] = os.pathsep.join(
                [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]
            )
        return kept | settings | self.server.environment(fresh or self.home / "hf")

    def llmprune(self, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmprune.cli", *map(str, arguments)]
        options = {"env": self.environment(), "cwd": self.home} | options
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    def succeed(self, *arguments: Any) -> str:
        child = self.llmprune(*arguments)
        assert child.returncode == 0, child.stderr
        return child.stdout

    def generate(self, load: str, repo: str) -> list[int]:
        """Greedy tokens in a fresh process with an empty cache."""
        fresh = self.home / f"fresh{time.monotonic_ns()}"
        child = subprocess.run(
            [sys.executable, "-P", "-c", load + GENERATE, repo, json.dumps(PROMPT)],
            capture_output=True,
            text=True,
            env=self.environment(fresh=fresh, ours=load in (OURS, BLOCKS)),
            cwd=self.home,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def client(saved_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("machine") / "annabel"
    home.mkdir()
    card = b"---\nlicense: mit\n---\n# dense\n"
    files = {file.name: file.read_bytes() for file in saved_folder.iterdir()}
    with HubServer() as server:
        server.create("ann/dense", {**files, "README.md": card})
        yield Client(server, home)


def publish(
    client: Client, name: str, source: str = "ann/dense", prune: dict[str, Any] | None = None
) -> tuple[Path, str]:
    """Prune a model that lives on the server and push it; the run's folder, and the id."""
    rule = {"sparsity": 0.5, "min_kept": 2, "scope": "layer" if name == "uniform" else "model"}
    recipe = {
        "model": {"source": source},
        "calibration": {"dataset": "builtin:python-reference", "num_rows": 8, "row_length": 16},
        "prune": prune or {"mlp_channels": rule},
        "gates": {"steps": 4},
        "recovery": {"steps": 2},
        "export": {"format": "per_layer" if name == "per_layer" else "uniform"},
        "evaluation": {
            "speed": None,
            "prompt": "the cat",
            "perplexity": [{"dataset": "builtin:python-reference", "window": 16, "max_windows": 4}],
        },
    }
    file, run = client.home / f"{name}.yaml", client.home / "runs" / name
    file.write_text(yaml.safe_dump(recipe))
    client.succeed("prune", file, "--out", run)
    client.succeed("push", run, f"ann/{name}")
    return run, f"ann/{name}"


@pytest.fixture(scope="module")
def uniform(client: Client) -> tuple[Path, str]:
    return publish(client, "uniform")


@pytest.fixture(scope="module")
def per_layer(client: Client) -> tuple[Path, str]:
    return publish(client, "per_layer")


def here(run: Path) -> list[int]:
    model = load_pruned(run)
    return model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0].tolist()


def test_a_stranger_loads_it_by_id_and_gets_the_same_tokens(
    client: Client, uniform: tuple[Path, str]
) -> None:
    run, repo = uniform
    expected = here(run)
    assert len(expected) > len(PROMPT)
    assert client.generate(STOCK, repo) == expected
    assert client.generate(OURS, repo) == expected
    assert not {path for path in client.server.files(repo) if path.endswith(".py")}


def test_a_model_whose_layers_differ_is_loaded_by_id_with_its_code_or_with_ours(
    client: Client, per_layer: tuple[Path, str]
) -> None:
    run, repo = per_layer
    expected = here(run)
    assert client.generate(OURS, repo) == expected
    assert client.generate(REMOTE, repo) == expected


def test_weight_blocks_are_loaded_by_id_as_zeros_or_as_blocks(
    client: Client, saved_folder: Path, tmp_path: Path
) -> None:
    wide = shutil.copytree(saved_folder, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(wide)
    client.server.create("ann/wide", {file.name: file.read_bytes() for file in wide.iterdir()})
    blocks = {"weight_blocks": {"block": [16, 16], "sparsity": 0.5}}
    run, repo = publish(client, "blocks", "ann/wide", blocks)
    expected = here(run)
    assert client.generate(STOCK, repo) == expected
    assert client.generate(BLOCKS, repo) == expected
    assert "llmprune/block_index.safetensors" in client.server.files(repo)


def test_the_recipe_that_went_up_gives_the_same_plan(
    client: Client, uniform: tuple[Path, str]
) -> None:
    run, repo = uniform
    files = client.server.files(repo)
    folder = client.home / "again" / repo
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_bytes(files["llmprune/recipe.yaml"])
    recipe = Recipe.read(folder / "recipe.yaml")
    commit = client.server.repositories["ann/dense"].branches["main"]
    assert recipe.model.revision == commit
    client.succeed("prune", folder / "recipe.yaml", "--out", folder / "run")
    assert (folder / "run" / "plan.json").read_bytes() == files["llmprune/plan.json"]
    assert (folder / "run" / "plan.json").read_bytes() == (run / "plan.json").read_bytes()
    weights = (folder / "run" / "model" / "model.safetensors").read_bytes()
    assert weights == files["model.safetensors"]


def test_the_card_names_the_licence_and_the_dense_model(
    client: Client, uniform: tuple[Path, str]
) -> None:
    _, repo = uniform
    card = client.server.files(repo)["README.md"].decode()
    data = front_matter(card)
    assert (data["license"], data["base_model"]) == ("mit", "ann/dense")
    commit = client.server.repositories["ann/dense"].branches["main"]
    assert f"`ann/dense@{commit}`" in card


def test_nothing_secret_or_of_this_machine_is_in_the_store(
    client: Client, uniform: tuple[Path, str]
) -> None:
    _, repo = uniform
    secrets = ["annabel", str(client.home), WRITER, client.server.url, "127.0.0.1", str(ROOT)]
    for path, content in client.server.files(repo).items():
        for secret in secrets:
            assert secret.encode() not in content, (path, secret)


def test_what_was_pushed_is_pruned_again_by_id_and_revision(
    client: Client, uniform: tuple[Path, str]
) -> None:
    run, repo = uniform
    client.succeed("push", run, repo, "--revision", "half")
    out = client.home / "twice"
    options = ["--set", f"model.source={repo}", "--set", "model.revision=half"]
    client.succeed("prune", run / "recipe.yaml", "--out", out, *options)
    name = "layers.0.mlp_channels"
    kept = [len(PrunePlan.read(folder / "plan.json").kept[name]) for folder in (run, out)]
    assert kept == [12, 6]
    commit = client.server.repositories[repo].branches["half"]
    verification = json.loads((out / "verification.json").read_text())
    assert verification["dense_model"] == f"{repo}@{commit}"


def test_a_model_whose_layers_differ_is_pruned_again_and_none_of_its_code_is_run(
    client: Client, per_layer: tuple[Path, str]
) -> None:
    run, repo = per_layer
    out = client.home / "other-kind"
    options = ["--set", f"model.source={repo}", "--set", "prune={heads: {sparsity: 0.5}}"]
    client.succeed("prune", run / "recipe.yaml", "--out", out, *options)
    assert len(PrunePlan.read(out / "plan.json").kept["layers.0.heads"]) == 2
    assert not list(client.home.rglob("hf/hub/*per_layer*/**/modeling_pruned.py"))


def test_a_push_that_is_killed_leaves_the_branch_and_can_be_given_again(
    client: Client, uniform: tuple[Path, str]
) -> None:
    run, repo = uniform
    target = f"{repo}-killed"
    server = client.server
    server.faults = [Fault(rf"PUT /lfs/{target}/", hold=threading.Event())]
    child = subprocess.Popen(
        [sys.executable, "-m", "llmprune.cli", "push", str(run), target],
        env=client.environment(),
        cwd=client.home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not server.faults[0].seen:
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    server.faults[0].hold.set()
    server.faults.clear()
    assert set(server.files(target)) == {".gitattributes"}
    client.succeed("push", run, target)
    assert len(server.repositories[target].commits) == 2
    assert "model.safetensors" in server.files(target)


def limit_files(limit: int) -> Any:
    """No file may grow beyond `limit` bytes: a write fails as it does on a full disk."""

    def limit_child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return limit_child


def test_a_full_disk_does_not_stop_a_push(client: Client, uniform: tuple[Path, str]) -> None:
    run, repo = uniform
    # of what a push writes nothing is needed but the dense model's card, for its licence
    target = f"{repo}-full"
    environment = client.environment(fresh=client.home / f"full-{target.replace('/', '-')}")
    child = client.llmprune("push", run, target, env=environment, preexec_fn=limit_files(20))
    assert child.returncode == 0, child.stderr
    assert "model.safetensors" in client.server.files(target)
    assert "its card can't be read" in child.stderr


def test_a_download_onto_a_full_disk_or_a_broken_line_is_one_line_and_can_be_given_again(
    client: Client, uniform: tuple[Path, str]
) -> None:
    _, repo = uniform
    environment = client.environment(fresh=client.home / f"narrow-{repo.replace('/', '-')}")
    code = f"from llmprune import load_pruned\nload_pruned({repo!r})"
    command = [sys.executable, "-P", "-c", code]

    def load(**options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, **options
        )

    child = load(preexec_fn=limit_files(3000))
    assert child.returncode == 1
    assert "InputError" in child.stderr.splitlines()[-1]
    assert "the download broke off" in child.stderr.splitlines()[-1]
    assert load().returncode == 0
