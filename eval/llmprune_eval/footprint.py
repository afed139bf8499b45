"""What a model takes before it runs: the form it is loaded in, load time, disk, peak memory."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from llmprune.block_sparse import keep_faster
from llmprune.checkpoint import has_blocks, load_pruned, save_pruned
from llmprune.downloads import weight_files
from llmprune.errors import InputError
from llmprune.sources import fetch, load_config, load_dense
from llmprune_eval.inference import check_positions
from llmprune_eval.peak_memory import PeakMemory, measure_peak_memory
from llmprune_eval.subjects import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Backend = Literal["eager", "compile", "block_sparse"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Each model is loaded so often, in turn; once only where it takes longer than this many seconds.
LOADS, _LONG_LOAD_S = 3, 20.0


@dataclass(frozen=True)
class Contender:
    """A subject in the form that it is measured in.

    Attributes:
        subject: The model.
        block_sparse: Its block-sparse layers run, not dense ones with zeros.
    """

    subject: Subject
    block_sparse: bool = False

    def load(self) -> PreTrainedModel:
        """Load it in eval mode, on the GPU where there is one; errors as `load_dense`."""
        source = self.subject.source
        resolved = fetch(source)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if resolved.gguf_file is not None or source.trust_remote_code:
            return load_dense(source).model.to(device)
        dtype = getattr(torch, source.dtype)
        model = load_pruned(resolved.folder, dtype=dtype, block_sparse=self.block_sparse)
        model.to(device)
        keep_faster(model)
        return model

    def weight_bytes(self) -> int:
        """Bytes of its weight files."""
        resolved = fetch(self.subject.source)
        if resolved.gguf_file is not None:
            return (resolved.folder / resolved.gguf_file).stat().st_size
        files = weight_files(resolved.folder, self.subject.source.source)
        return sum(file.stat().st_size for file in files)


def contenders_of(subjects: Sequence[Subject], backend: Backend | None) -> tuple[Contender, ...]:
    """The subjects, those with pruned weight blocks in block-sparse form unless asked otherwise.

    Raises:
        InputError: `block_sparse` is asked for and no model has pruned weight blocks.
    """
    wanted = backend in (None, "block_sparse")
    found = tuple(Contender(subject, wanted and _has_blocks(subject)) for subject in subjects)
    if backend == "block_sparse" and not any(contender.block_sparse for contender in found):
        names = ", ".join(subject.name for subject in subjects)
        raise InputError(
            f"--backend block_sparse needs a model that weight blocks were pruned from, got {names}"
            "; leave it out"
        )
    return found


def check_lengths(subjects: Sequence[Subject], length: int) -> None:
    """Check that a row of `length` tokens fits every subject, without loading it.

    Raises:
        InputError: It fits not; or there is no such model.
    """
    for subject in subjects:
        config = load_config(subject.source)
        check_positions(config, length, what=f"{subject.name}: context + new-tokens")


def load_in_turn(
    contenders: Sequence[Contender],
) -> tuple[dict[str, PreTrainedModel], dict[str, list[float]]]:
    """Load all some times in turn: the models by label, and the seconds of each load.

    The files are in the system's cache from the second time on. A GGUF file is unpacked each time.
    """
    models: dict[str, PreTrainedModel] = {}
    seconds: dict[str, list[float]] = {c.subject.label: [] for c in contenders}
    for index in range(LOADS):
        for contender in contenders:
            label = contender.subject.label
            if index and max(seconds[label]) > _LONG_LOAD_S:
                continue
            models.pop(label, None)
            gc.collect()
            start = time.perf_counter()
            models[label] = contender.load()
            seconds[label].append(time.perf_counter() - start)
    return {label: models[label] for label in seconds}, seconds


def peak_memory_at(
    contender: Contender, points: Sequence[tuple[int, int]], new_tokens: int
) -> list[PeakMemory | None]:
    """Peak memory of loading and running a model at each (batch_size, context), in eager mode.

    None where the model needs code of its own. A GGUF file is written out as safetensors first, so
    that unpacking does not count.
    """
    source = contender.subject.source
    if source.trust_remote_code:
        return [None for _ in points]
    resolved = fetch(source)
    loader = "load_block_sparse" if contender.block_sparse else "load_pruned"
    options: dict[str, Any] = {"loader": f"llmprune.checkpoint:{loader}", "dtype": source.dtype}
    options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        folder = resolved.folder
        if resolved.gguf_file is not None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="llmprune-"))
            folder = Path(scratch) / "model"
            save_pruned(load_dense(source).model, None, folder)
        return [
            measure_peak_memory(
                folder, batch_size=batch_size, context=context, new_tokens=new_tokens, **options
            )
            for batch_size, context in points
        ]


def _has_blocks(subject: Subject) -> bool:
    resolved = fetch(subject.source)
    return resolved.gguf_file is None and has_blocks(resolved.folder)
