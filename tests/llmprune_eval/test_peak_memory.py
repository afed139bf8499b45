import os
import sys

import pytest

from llmprune.errors import InputError
from llmprune_eval import peak_memory
from llmprune_eval.peak_memory import measure_peak_memory

LOADER = """
import os
from transformers import AutoModelForCausalLM

def load(folder):
    assert "HF_TOKEN" not in os.environ
    print("a loader may print")
    return AutoModelForCausalLM.from_pretrained(folder)
"""


@pytest.fixture
def loader(tmp_path, monkeypatch):
    (tmp_path / "peak_memory_loader.py").write_text(LOADER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "peak_memory_loader:load"


@pytest.mark.slow
def test_child_sees_a_larger_model_as_larger(make_llama, tmp_path, loader, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    make_llama().save_pretrained(tmp_path / "small")
    large = make_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    large.save_pretrained(tmp_path / "large")
    num_bytes = sum(weight.numel() * 4 for weight in large.parameters())
    small, big = (
        measure_peak_memory(tmp_path / name, loader=loader, context=8, new_tokens=2)
        for name in ("small", "large")
    )
    assert small.device == "cpu"
    assert 0 < small.before_bytes < small.peak_bytes
    assert big.peak_bytes - small.peak_bytes > 0.8 * num_bytes


@pytest.mark.slow
def test_child_does_not_inherit_the_parents_peak(make_llama, tmp_path, loader):
    make_llama().save_pretrained(tmp_path / "small")
    ballast = bytearray(os.urandom(1 << 20) * 1200)
    got = measure_peak_memory(tmp_path / "small", loader=loader, context=8, new_tokens=1)
    assert got.peak_bytes < len(ballast)


def test_child_failure_is_told(tmp_path):
    with pytest.raises(InputError, match=r"fresh process, got exit code 1: .*no_such_module"):
        measure_peak_memory(tmp_path, loader="no_such_module:load")


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ("no_colon", "must be module:function, got 'no_colon'"),
        ("json:", "must be module:function"),
        ("json:missing", "must name an importable function"),
        ("no_such_module:load", "must name an importable function"),
    ],
)
def test_bad_loader_is_named(loader, message):
    with pytest.raises(InputError, match=message):
        peak_memory._resolve(loader)


def test_bad_folder_and_counts_are_named(tmp_path):
    with pytest.raises(InputError, match="needs the folder of a saved model"):
        measure_peak_memory(tmp_path / "none")
    with pytest.raises(InputError, match="context must be at least 1, got 0"):
        measure_peak_memory(tmp_path, context=0)


def test_child_gets_the_import_path_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("SOME_API_KEY", "secret")
    environment = peak_memory._child_environment()
    assert "secret" not in environment.values()
    assert set(filter(None, sys.path)) <= set(environment["PYTHONPATH"].split(os.pathsep))
