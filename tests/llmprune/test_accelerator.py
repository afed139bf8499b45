"""One process, several runs."""

from __future__ import annotations

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from llmprune.accelerator import start_accelerator
from llmprune.errors import InputError
from llmprune.recipe_training import Training


@pytest.fixture(autouse=True)
def untouched():
    """Each test, and what follows, in a process that seems new."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_the_next_run_may_have_another_precision():
    first = start_accelerator(Training(mixed_precision="bf16"), 0)
    assert first.mixed_precision == "bf16"
    second = start_accelerator(Training(mixed_precision="no"), 0)
    assert second.mixed_precision == "no"
    assert start_accelerator(Training(mixed_precision="bf16"), 0).mixed_precision == "bf16"
    assert second.device == first.device


def test_an_accelerator_of_the_users_own_keeps_its_precision():
    own = Accelerator(mixed_precision="bf16")
    with pytest.raises(InputError, match=r"has bf16, got no: give bf16"):
        start_accelerator(Training(mixed_precision="no"), 0)
    assert own.mixed_precision == "bf16"
    assert start_accelerator(Training(mixed_precision="bf16"), 0).mixed_precision == "bf16"
