"""The Accelerator of a run; the only file that imports the library."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from llmprune.errors import InputError
from llmprune.recipe_training import Training

# In Accelerate's state of a process that a run of ours began.
OF_A_RUN = "of_a_run"


def start_accelerator(
    training: Training,
    seed: int,
    *,
    trackers: Sequence[str] = (),
    project_dir: Path | None = None,
) -> Accelerator:
    """The Accelerator of a run; seeds every generator. Several processes part when they end.

    Args:
        training: Its `mixed_precision` is no longer `auto`.
        seed: Of every generator.
        trackers: Who will be told of every step, once `llmprune.tracking` has started them.
        project_dir: Where trackers that write files write them.

    Raises:
        InputError: The process has an Accelerator of another precision, and it is not a run's.
    """
    set_seed(seed)
    _forget_precision(training.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        log_with=list(trackers) or None,
        project_dir=project_dir,
    )
    AcceleratorState._shared_state.setdefault(OF_A_RUN, True)
    if accelerator.num_processes > 1:
        # threads of a process group that is still there can abort a process that is done
        atexit.register(accelerator.end_training)
    return accelerator


def _forget_precision(wanted: str) -> None:
    """Let a run of this process have another precision than the run before.

    Accelerate keeps one for a process. `auto` is measured, so that even runs of one recipe may
    differ. The process group, if there is one, stays.

    Raises:
        InputError: The precision is that of an Accelerator which no run of ours made.
    """
    state = AcceleratorState._shared_state
    had = state.get("_mixed_precision", wanted)
    if had == wanted:
        return
    if OF_A_RUN not in state:
        raise InputError(
            f"training.mixed_precision: an Accelerator of this process has {had}, got {wanted}: "
            f"give {had}, or prune in another process"
        )
    AcceleratorState._reset_state()
