"""Run folders to publish, written in milliseconds, and a client that talks to a loopback Hub."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import yaml

from llmprune.recipe import Recipe
from llmprune.verification import Verification, model_sha256
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.report import EvalReport, ModelSize, TextResult

DENSE = "ann/dense"
ORIGIN = f"{DENSE}@{'a1' * 20}"


def recipe_of(**changes: Any) -> Recipe:
    """A recipe as a run folder keeps it."""
    data = {
        "model": {"source": DENSE},
        "calibration": {"dataset": "builtin:python-reference", "num_rows": 8, "row_length": 16},
        "prune": {"mlp_channels": {"sparsity": 0.5}},
        "evaluation": {"speed": None, "prompt": "the cat"},
    }
    return Recipe.parse({**data, **changes})


def verification_of(model: Path, **changes: Any) -> Verification:
    """What verifying a sound model finds."""
    figures = {"forward": 1e-15, "kv_cache": 2e-15, "left_padding": 1e-15}
    found: dict[str, Any] = {
        "reference": "gated",
        "dense_model": ORIGIN,
        "sha256": model_sha256(model),
        "cut_from_gated": {"float32": 0.0, "float64": 0.0},
        "model_class": "LlamaForCausalLM",
        "remote_code": False,
        "missing_keys": [],
        "unexpected_keys": [],
        "llmprune_imported": False,
        "largest_logit": 1.5,
        "max_abs_difference": {"float32": figures, "float64": figures},
    }
    return Verification(**{**found, **changes})


def perplexity(value: float) -> Perplexity:
    """Of three windows that differ a little."""
    nlls = tuple(math.log(value) + shift for shift in (-0.1, 0.0, 0.1))
    return Perplexity(value, 45, 3, 16, math.log(value), 0.06, nlls)


def report_of(**changes: Any) -> EvalReport:
    """Figures of a model that lost half of its channels."""
    text = TextResult(
        name="python-reference/test",
        in_domain=False,
        dense=perplexity(4.0),
        pruned=perplexity(6.0),
    )
    found: dict[str, Any] = {
        "environment": {"device": "Some CPU", "torch": "2", "date": "2026-11-01"},
        "dense": ModelSize(parameters=4000, decoder_parameters=3000),
        "pruned": ModelSize(parameters=3000, decoder_parameters=2000),
        "perplexities": (text,),
        "samples": {"dense": "the cat sat", "pruned": "the cat the"},
    }
    return EvalReport(**{**found, **changes})


def finished_run(
    folder: Path,
    model: Path,
    *,
    recipe: Recipe | None = None,
    verification: dict[str, Any] | None = None,
    report: EvalReport | None = None,
) -> Path:
    """A folder as `prune` leaves it, around a saved model."""
    shutil.copytree(model, folder / "model")
    (folder / "recipe.yaml").write_text((recipe or recipe_of()).to_yaml())
    plan = {"format": "llmprune-plan/1", "model": {}, "kept": {}}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "scores.json").write_text("{}")
    found = verification_of(folder / "model", **(verification or {}))
    (folder / "verification.json").write_text(found.model_dump_json())
    (folder / "report.json").write_text((report or report_of()).to_json())
    (folder / "README.md").write_text("# of the run folder\n")
    (folder / "log.jsonl").write_text('{"phase": "gates", "step": 1, "loss": 0.5}\n')
    (folder / "gates.safetensors").write_bytes(b"a state that is under way")
    return folder


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a model card."""
    return yaml.safe_load(card.split("---\n")[1])
