"""Whole models on a GPU: dense, fewer units, and MLPs of stored blocks, timed in turns.

    python eval/benchmarks/gpu_models.py [--layers 8] [--compile] [--results FOLDER]

Layers have the sizes of Llama-3.1-8B and random weights: speed does not depend on their values, and
nothing is downloaded. There are fewer layers than in that model, so that five models fit in a
minute. A decode step runs as one CUDA graph with a cache of fixed size, a prompt launch by launch.
Models take turns in every round. One JSON and one Markdown file are written for the device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, MistralConfig, StaticCache

from llmprune.files import save_text
from llmprune_kernels import BlockSparseLinear, BlockSparseMLP
from llmprune_kernels.timing import Graph, Timing, interleaved

RESULTS = Path(__file__).parents[1] / "results"
BLOCK = (128, 32)
CONTEXT = 2048
BATCHES = (1, 16)
# (heads, KV groups, MLP channels) of Llama-3.1-8B, and with a quarter and a half of them removed
UNITS = {"dense": (32, 8, 14336), "units 25 %": (24, 6, 10752), "units 50 %": (16, 4, 7168)}
# stored share of every MLP projection
DENSITIES = {"MLP blocks 50 %": 0.5, "MLP blocks 75 %": 0.25}


def build(name: str, layers: int) -> Any:
    """A model of random weights on the GPU, bfloat16."""
    heads, groups, channels = UNITS.get(name, UNITS["dense"])
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=128,
        max_position_embeddings=8192,
        sliding_window=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if name in DENSITIES:
        for layer in model.model.layers:
            mlp = layer.mlp
            parts = [
                sparse(p, DENSITIES[name]) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            ]
            layer.mlp = BlockSparseMLP(*parts)
    return model


def sparse(linear: torch.nn.Linear, density: float) -> BlockSparseLinear:
    """The projection with equally many blocks of every block row stored, drawn."""
    rows, columns = linear.out_features // BLOCK[0], linear.in_features // BLOCK[1]
    kept = torch.rand(rows, columns).topk(round(columns * density), 1).indices
    mask = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, kept, True)
    return BlockSparseLinear.from_dense(linear, mask)


def decode_launch(model: Any, batch: int) -> Any:
    """One decode step after `CONTEXT` tokens, ready to be captured."""
    cache = StaticCache(model.config, max_cache_len=CONTEXT + 64)
    prompt = torch.randint(0, 32000, (batch, CONTEXT), device="cuda")
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = prompt[:, :1].clone()
    position = torch.full((batch, 1), CONTEXT, device="cuda")
    lengths = [layer.cumulative_length for layer in cache.layers]

    def launch() -> None:
        model(
            token,
            past_key_values=cache,
            position_ids=position,
            use_cache=True,
            logits_to_keep=1,
        )
        # every step is the one after `CONTEXT` tokens
        torch._foreach_sub_(lengths, 1)

    return launch


class Passes:
    """Launches without a graph, timed as `interleaved` times graphs."""

    def __init__(self, launch: Any) -> None:
        self.launch, self.count = launch, 1
        launch()

    def round_us(self, repeats: int) -> float:
        """Microseconds of one pass, averaged over `repeats`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            self.launch()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / repeats


@torch.inference_mode()
def measure(layers: int, *, compiled: bool) -> dict[str, dict[str, Timing]]:
    """Times by phase and model."""
    models = {name: build(name, layers) for name in (*UNITS, *DENSITIES)}
    if compiled:
        for model in models.values():
            for layer in model.model.layers:
                layer.compile(dynamic=False)
    found = {}
    for batch in BATCHES:
        graphs = {name: Graph([decode_launch(model, batch)]) for name, model in models.items()}
        found[f"decode, batch {batch}"] = interleaved(graphs)
        del graphs
        torch.cuda.empty_cache()
    prompt = torch.randint(0, 32000, (1, CONTEXT), device="cuda")
    prefills = {
        name: Passes(partial(model, prompt, use_cache=False, logits_to_keep=1))
        for name, model in models.items()
    }
    found[f"prompt of {CONTEXT}"] = interleaved(prefills)  # type: ignore[arg-type]
    return found


def report(found: dict[str, dict[str, Timing]], facts: dict[str, Any]) -> str:
    """One table: milliseconds with their range, and how often as fast as dense."""
    lines = [
        f"# Whole models on {facts['device']}",
        "",
        f"{facts['date']}; torch {facts['torch']}, transformers {facts['transformers']}, bfloat16, "
        f"{facts['layers']} layers of the sizes of Llama-3.1-8B with random weights, context "
        f"{CONTEXT}, {'layers compiled' if facts['compiled'] else 'not compiled'}. Medians of 5 "
        "rounds in turns, fastest to slowest round; x = dense time over the model's.",
        "",
        "| model | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for name in (*UNITS, *DENSITIES):
        cells = [
            f"{t.median_us / 1e3:.3f} ms ({t.fastest_us / 1e3:.3f}-{t.slowest_us / 1e3:.3f}), "
            f"{times['dense'].median_us / t.median_us:.2f}x"
            for times in found.values()
            for t in [times[name]]
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="compile every layer")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_models.py times models on a GPU, and here is none", file=sys.stderr)
        return 2
    facts = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": options.layers,
        "compiled": options.compile,
    }
    found = measure(options.layers, compiled=options.compile)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = options.results / f"models-{slug}{'-compiled' if options.compile else ''}"
    options.results.mkdir(parents=True, exist_ok=True)
    phases = {
        phase: {name: asdict(timing) for name, timing in times.items()}
        for phase, times in found.items()
    }
    text = report(found, facts)
    save_text(json.dumps(facts | {"phases": phases}, indent=1) + "\n", path.with_suffix(".json"))
    save_text(text, path.with_suffix(".md"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
