"""evaluate(dense, pruned): quality, speed and memory side by side, as a recipe asks."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.architectures import architecture_of
from llmprune.block_sparse import block_sparse_layers
from llmprune.checkpoint import folder_bytes, has_blocks, save_pruned
from llmprune.latency import Promise
from llmprune.recipe import ModelSource, PerplexityTask, Recipe, SpeedTask
from llmprune.sources import fetch
from llmprune.texts import corpus_of, read_texts, resolve_text, text_name
from llmprune_eval.documents import encode_documents
from llmprune_eval.peak_memory import PeakMemory, measure_peak_memory
from llmprune_eval.perplexity import Perplexity, measure_perplexity
from llmprune_eval.report import EvalReport, LatencyResult, ModelSize, TextResult, environment
from llmprune_eval.speed import Latency, SpeedReport, measure_phase, measure_speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# task, done, of how many
OnProgress = Callable[[str, int, int], None]


def evaluate(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: Recipe,
    folder: Path,
    promise: Promise | None = None,
    on_progress: OnProgress,
) -> EvalReport:
    """Measure what `recipe.evaluation` names on both models.

    Args:
        dense: The model before pruning, on the device to measure on.
        pruned: The model after, on the same device.
        tokenizer: Of both.
        recipe: Its `evaluation`, `calibration` and `model` are used.
        folder: Where the pruned model is saved.
        promise: What a latency budget's table said, to be measured again.
        on_progress: Called with a task's name as it proceeds.
    """
    texts = tuple(
        measure_text(task, dense, pruned, tokenizer, recipe=recipe, on_progress=on_progress)
        for task in different_texts(recipe.evaluation.perplexity)
    )
    task = recipe.evaluation.speed
    speed = None if task is None else compare_speed(task, dense, pruned, on_progress)
    memory: dict[str, PeakMemory | None] = {"dense": None, "pruned": None}
    if task is not None:
        memory = {**memory, **compare_memory(recipe, dense, folder, task, on_progress)}
    return EvalReport(
        environment=environment(dense.device, pruned.dtype),
        dense=_size(dense, None, memory["dense"]),
        pruned=_size(pruned, folder, memory["pruned"]),
        perplexities=texts,
        speed=speed,
        latency=None if promise is None else check_promise(promise, dense, pruned, on_progress),
        samples={
            "dense": generate(dense, tokenizer, recipe.evaluation.prompt),
            "pruned": generate(pruned, tokenizer, recipe.evaluation.prompt),
        },
        backends=() if task is None else backend_notes(pruned, task),
    )


def backend_notes(model: PreTrainedModel, task: SpeedTask) -> tuple[str, ...]:
    """What runs a model's block-sparse layers in each phase, and why; none without such layers."""
    layers = block_sparse_layers(model).values()
    notes = []
    for phase, rows in (("prefill", task.batch_size * task.context), ("decode", task.batch_size)):
        choices = Counter(layer.choice(rows) for layer in layers)
        notes += [
            f"block-sparse {phase}: {choice.backend} in {count} of {len(layers)} layers "
            f"({choice.reason})"
            for choice, count in choices.most_common()
        ]
    return tuple(notes)


def measure_text(
    task: PerplexityTask,
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: Recipe,
    on_progress: OnProgress,
) -> TextResult:
    """Perplexity of both models on one text, marked where calibration used the same corpus."""
    source = resolve_text(task)
    token_ids, documents = encode_documents(read_texts(source), tokenizer)
    found: dict[str, Perplexity] = {}
    for name, model in (("dense", dense), ("pruned", pruned)):
        found[name] = measure_perplexity(
            model,
            token_ids,
            window=task.window,
            max_windows=task.max_windows,
            documents=documents,
            on_window=partial(on_progress, f"{text_name(source)}, {name}"),
        )
    return TextResult(
        name=text_name(source),
        in_domain=corpus_of(source) == corpus_of(resolve_text(recipe.calibration)),
        dense=found["dense"],
        pruned=found["pruned"],
    )


def compare_speed(
    task: SpeedTask, dense: PreTrainedModel, pruned: PreTrainedModel, on_progress: OnProgress
) -> SpeedReport:
    """Prefill and decode latency, both models in turn in one process."""
    return measure_speed(
        {"dense": dense, "pruned": pruned},
        batch_size=task.batch_size,
        context=task.context,
        new_tokens=task.new_tokens,
        rounds=task.rounds,
        on_round=lambda done, total: on_progress("latency", done, total),
    )


def check_promise(
    promise: Promise, dense: PreTrainedModel, pruned: PreTrainedModel, on_progress: OnProgress
) -> LatencyResult:
    """Time the phase that a latency budget names again, both models in turn."""
    budget = promise.budget
    report = measure_phase(
        {"dense": dense, "pruned": pruned},
        budget,
        on_round=lambda done, total: on_progress("latency budget", done, total),
    )
    again: dict[str, Latency] = {n: getattr(m, budget.phase) for n, m in report.models.items()}
    return LatencyResult(
        phase=budget.phase,
        batch_size=budget.batch_size,
        context=budget.context,
        predicted={"dense": promise.dense_ms, "pruned": promise.pruned_ms},
        measured={name: latency.median_ms for name, latency in again.items()},
        waited={name: latency.waited for name, latency in again.items()},
        ratio=getattr(report.ratios["pruned"], budget.phase),
    )


def compare_memory(
    recipe: Recipe,
    dense: PreTrainedModel,
    folder: Path,
    task: SpeedTask,
    on_progress: OnProgress,
) -> dict[str, PeakMemory]:
    """Peak memory of loading and running each model, in the form that it is stored in."""
    sizes: dict[str, Any] = {
        "batch_size": task.batch_size,
        "context": task.context,
        "new_tokens": task.new_tokens,
        "device": str(dense.device),
    }
    on_progress("peak memory", 0, 2)
    with tempfile.TemporaryDirectory(prefix="llmprune-") as scratch:
        stored = _stored_dense(recipe.model, dense, Path(scratch))
        dense_memory = measure_peak_memory(stored, **sizes)
    on_progress("peak memory", 1, 2)
    if has_blocks(folder):
        sizes["loader"] = "llmprune.checkpoint:load_block_sparse"
    pruned_memory = measure_peak_memory(folder, **sizes)
    on_progress("peak memory", 2, 2)
    return {"dense": dense_memory, "pruned": pruned_memory}


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The greedy continuation of a prompt, prompt included, 24 new tokens at most."""
    tokenized = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(
        **tokenized, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def different_texts(tasks: tuple[PerplexityTask, ...]) -> tuple[PerplexityTask, ...]:
    """The tasks with their texts resolved; of two that became the same by a fallback, the first."""
    found: dict[tuple[str, int, int | None], PerplexityTask] = {}
    for task in tasks:
        resolved = resolve_text(task)
        key = (text_name(resolved), resolved.window, resolved.max_windows)
        found.setdefault(key, resolved)
    return tuple(found.values())


def _stored_dense(source: ModelSource, dense: PreTrainedModel, scratch: Path) -> Path:
    """The dense model's folder; a GGUF file is written out, so that unpacking doesn't count."""
    resolved = fetch(source)
    if resolved.gguf_file is None:
        return resolved.folder
    save_pruned(dense, None, scratch / "dense")
    return scratch / "dense"


def _size(model: PreTrainedModel, folder: Path | None, memory: PeakMemory | None) -> ModelSize:
    prefix = f"{architecture_of(model.config.model_type).layers}."
    counts = [(name, p.numel()) for name, p in model.named_parameters()]
    return ModelSize(
        parameters=sum(count for _, count in counts),
        decoder_parameters=sum(count for name, count in counts if name.startswith(prefix)),
        disk_bytes=None if folder is None else folder_bytes(folder),
        peak_memory=memory,
    )
