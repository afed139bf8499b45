import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from llmprune_kernels import native, native_build, reference
from llmprune_kernels.bsr import BLOCK_SIDES, scatter_blocks
from tests.llmprune_kernels import blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One row; a short and a whole tile; just under and over a vector; more than one panel.
ROWS = (1, 2, 7, 11, 12, 16, 17, 49)
needs_compiler = pytest.mark.skipif(
    native_build.find_compiler() is None or native_build.is_switched_off(),
    reason="no C++ compiler, or LLMPRUNE_KERNELS_NATIVE=0",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _unbuilt(tmp_path, monkeypatch):
    """As in a process that has not asked for the library yet, with an empty cache folder."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    native._library.cache_clear()
    native._best.cache_clear()
    yield
    native._library.cache_clear()
    native._best.cache_clear()


@pytest.fixture
def _poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def usable() -> list[tuple[str, torch.dtype]]:
    best = native.INSTRUCTION_SETS.index(native.instruction_set())
    pairs = itertools.product(native.INSTRUCTION_SETS[: best + 1], DTYPES)
    return [pair for pair in pairs if pair != ("portable", torch.float16)]


@needs_compiler
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("block", itertools.product(BLOCK_SIDES, BLOCK_SIDES))
def test_every_block_shape_and_number_of_rows_equals_float64(block):
    for (name, dtype), pattern in zip(usable(), itertools.cycle(("random", "unequal"))):
        values, index = blocks.weight(pattern, dtype, block)
        for num_rows in ROWS:
            x = torch.randn(num_rows, 4 * block[1]).to(dtype)
            y = native.linear(x, values, index, using=name)
            assert y.shape == (num_rows, 3 * block[0])
            assert y.dtype == dtype
            error = reference.relative_error(y, reference.exact(x, values, index))
            assert error <= blocks.TOLERANCE[dtype], (name, dtype, num_rows)


@needs_compiler
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("pattern", blocks.PATTERNS)
def test_every_pattern_with_bias_and_strided_rows_equals_float64(pattern):
    for (name, dtype), num_rows in itertools.product(usable(), ROWS):
        values, index = blocks.weight(pattern, dtype, (32, 16))
        bias = torch.randn(96).to(dtype)
        x = blocks.surrounded(torch.randn(num_rows, 64).to(dtype))
        y = native.linear(x, values, index, bias, using=name)
        error = reference.relative_error(y, reference.exact(x, values, index, bias))
        assert error <= blocks.TOLERANCE[dtype], (name, dtype, num_rows)
        assert torch.equal(native.linear(x.T.contiguous().T, values, index, bias, using=name), y)


@needs_compiler
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("block", [(16, 128), (128, 16), (64, 64), (32, 16)])
def test_gradient_of_the_input_equals_float64(block):
    for (name, dtype), pattern in itertools.product(usable(), blocks.PATTERNS):
        values, index = blocks.weight(pattern, dtype, block)
        for num_rows in (1, 17, 49):
            dy = blocks.surrounded(torch.randn(num_rows, 3 * block[0]).to(dtype))
            dx = native.grad_input(dy, values, index, using=name)
            wanted = reference.grad_input(dy.double(), values.double(), index)
            error = reference.relative_error(dx, wanted)
            assert error <= blocks.TOLERANCE[dtype], (name, dtype, pattern, num_rows)


@needs_compiler
@pytest.mark.usefixtures("_poisoned")
def test_rows_that_are_packed_in_rounds_equal_float64():
    # 32 MiB of x, in rounds of 16
    values, index = blocks.weight("random", torch.float32, (32, 32), (2, 256))
    x = torch.randn(1000, 8192)
    wanted = reference.exact(x, values, index)
    assert reference.relative_error(native.linear(x, values, index), wanted) <= 8e-6


@needs_compiler
@pytest.mark.parametrize("block", [(64, 64), (16, 16), (32, 128)])
def test_sums_of_panels_have_one_order_whatever_panels_are_wide(block):
    """48 rows are three vectors of 16, which take a chain of blocks at a time; 16 take all."""
    for name, dtype in usable():
        values, index = blocks.weight("unequal", dtype, block, (7, 11))
        x = torch.randn(48, 11 * block[1]).to(dtype)
        dy = torch.randn(48, 7 * block[0]).to(dtype)
        y = native.linear(x, values, index, using=name)
        dx = native.grad_input(dy, values, index, using=name)
        for part in (slice(0, 16), slice(16, 48)):
            assert torch.equal(native.linear(x[part], values, index, using=name), y[part])
            assert torch.equal(native.grad_input(dy[part], values, index, using=name), dx[part])


@needs_compiler
@pytest.mark.usefixtures("_poisoned")
def test_swiglu_of_two_patterns_equals_float64():
    for (name, dtype), num_rows in itertools.product(usable(), ROWS):
        gate, gate_index = blocks.weight("unequal", dtype, (32, 32))
        up, up_index = blocks.weight("empty rows", dtype, (32, 32))
        x = torch.randn(num_rows, 128).to(dtype)
        y = native.linear_swiglu(x, gate, gate_index, up, up_index, using=name)
        wanted = reference.swiglu(x.double(), gate.double(), gate_index, up.double(), up_index)
        assert reference.relative_error(y, wanted) <= blocks.TOLERANCE[dtype], (name, dtype)


@needs_compiler
@pytest.mark.parametrize("gate_value", [-300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0])
def test_swiglu_of_extreme_gates_equals_float64(gate_value):
    index = blocks.weight("full", torch.float32, (16, 16), (1, 1))[1]
    gate = torch.full((1, 16, 16), gate_value / 16)
    up = torch.ones(1, 16, 16)
    y = native.linear_swiglu(torch.ones(1, 16), gate, index, up, index)
    wanted = functional.silu(torch.tensor(gate_value).double()) * 16
    assert y.isfinite().all()
    assert (y.double() - wanted).abs().max() <= 1e-6 * wanted.abs() + 1e-30


@needs_compiler
@pytest.mark.parametrize("num_rows", [3, 20])
def test_nan_of_a_row_stays_in_that_row(num_rows):
    for name, dtype in usable():
        values, index = blocks.weight("full", dtype, (16, 32))
        x = torch.randn(num_rows, 128).to(dtype)
        x[1] = float("nan")
        bad = native.linear(x, values, index, using=name).isnan()
        assert bad[1].all()
        assert not bad[torch.arange(num_rows) != 1].any()


GUARDED = """
import ctypes, mmap, sys, torch
from llmprune_kernels import native
from llmprune_kernels.bsr import BlockIndex

def at_the_end_of_memory(tensor):
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    pages = (size + page - 1) // page
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
    at = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(),
                          offset=pages * page - size)
    return at.view(tensor.shape).copy_(tensor)

for block in ((16, 16), (32, 16), (16, 64), (128, 128)):
    index = BlockIndex.from_mask(torch.ones(2, 3, dtype=torch.bool))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = at_the_end_of_memory(torch.randn(6, *block).to(dtype))
        bias = at_the_end_of_memory(torch.randn(2 * block[0]).to(dtype))
        for num_rows in (1, 7, 12, 17, 49):
            x = at_the_end_of_memory(torch.randn(num_rows, 3 * block[1]).to(dtype))
            dy = at_the_end_of_memory(torch.randn(num_rows, 2 * block[0]).to(dtype))
            for using in native.INSTRUCTION_SETS:
                best = native.INSTRUCTION_SETS.index(native.instruction_set())
                if native.INSTRUCTION_SETS.index(using) > best:
                    continue
                if dtype == torch.float16 and using == "portable":
                    continue
                native.linear(x, values, index, bias, using=using)
                native.grad_input(dy, values, index, using=using)
                native.linear_swiglu(x, values, index, values, index, using=using)
                square = (values, BlockIndex.from_mask(torch.ones(3, 2, dtype=torch.bool)))
                if block[0] == block[1]:
                    wide = torch.cat([bias, bias[:block[0]]])
                    wide = at_the_end_of_memory(wide)
                    both = ((values, index), (values, index), square, wide)
                    native.gated_mlp(x, *both, using=using)
print("done")
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="guards memory with mprotect")
def test_nothing_is_read_past_the_end_of_an_argument():
    environment = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


@needs_compiler
def test_it_brings_no_openmp_runtime_of_its_own():
    """In a process where nothing else could have brought one."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    code = (
        "from pathlib import Path; from llmprune_kernels import native; native.instruction_set();"
        "maps = Path('/proc/self/maps').read_text().splitlines();"
        "print(len({line.split()[-1] for line in maps if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_that_of_the_dense_product(dtype):
    values, index = blocks.weight("random", dtype, (64, 64), (8, 32))
    ulp = torch.finfo(dtype).eps
    for num_rows in (1, 16, 100):
        x = torch.randn(num_rows, 2048).to(dtype)
        wanted = reference.exact(x, values, index)
        dense = functional.linear(x, scatter_blocks(values, index))
        error = reference.relative_error(native.linear(x, values, index), wanted)
        assert error <= 1.5 * reference.relative_error(dense, wanted) + ulp


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(native, "_MIN_THREADED_WORK", 0)
    values, index = blocks.weight("unequal", dtype, (32, 32), (7, 6))
    before = torch.get_num_threads()
    try:
        for num_rows in (1, 11, 100):
            x, dy = torch.randn(num_rows, 192).to(dtype), torch.randn(num_rows, 224).to(dtype)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                y = native.linear(x, values, index)
                z = native.linear_swiglu(x, values, index, values, index)
                results.append((y, z, native.grad_input(dy, values, index)))
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0]))
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("block", [(16, 128), (128, 16), (64, 64)])
def test_a_row_of_few_has_the_same_bits_whatever_the_others_are(block):
    # As many as fit beside one vector of them; the tiles of AMX are another way.
    few = {"portable": 3, "avx2": 7}
    for name, dtype in (pair for pair in usable() if pair != ("amx", torch.bfloat16)):
        values, index = blocks.weight("unequal", dtype, block)
        x = torch.randn(few.get(name, 11), 4 * block[1]).to(dtype)
        together = native.linear(x, values, index, using=name)
        for rows in (slice(0, 1), slice(1, 3), slice(0, 3), slice(2, None)):
            apart = native.linear(x[rows], values, index, using=name)
            assert torch.equal(apart, together[rows]), (name, dtype, rows)


@needs_compiler
def test_no_rows_give_no_rows():
    values, index = blocks.weight("random", torch.float32, (16, 16))
    assert native.linear(torch.empty(0, 64), values, index).shape == (0, 48)


@needs_compiler
def test_what_does_not_fit_is_refused():
    values, index = blocks.weight("full", torch.float32, (16, 32))
    x = torch.randn(2, 128)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 128\), got \(2, 64\)"):
        native.linear(x[:, :64], values, index)
    with pytest.raises(ValueError, match="of one dtype"):
        native.linear(x.bfloat16(), values, index)
    with pytest.raises(ValueError, match="of one dtype"):
        native.linear(x.double(), values.double(), index)
    with pytest.raises(ValueError, match="12 contiguous blocks"):
        native.linear(x, values[1:], index)
    with pytest.raises(ValueError, match="12 contiguous blocks"):
        native.linear(x, values.transpose(0, 1).contiguous().transpose(0, 1), index)
    with pytest.raises(ValueError, match="bias must be"):
        native.linear(x, values, index, torch.zeros(3))
    with pytest.raises(ValueError, match="one block"):
        native.linear_swiglu(x, values, index, *blocks.weight("full", x.dtype, (32, 32)))


@pytest.mark.usefixtures("_unbuilt")
def test_switched_off_it_is_not_available_and_does_not_warn(monkeypatch):
    monkeypatch.setenv("LLMPRUNE_KERNELS_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.is_available()
    assert not native.supports(torch.float32)
    with pytest.raises(RuntimeError, match="LLMPRUNE_KERNELS_NATIVE=0"):
        native.instruction_set()


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch):
    monkeypatch.setenv("LLMPRUNE_KERNELS_NATIVE", "off")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'off'"):
        native_build.is_switched_off()


@pytest.mark.usefixtures("_unbuilt")
def test_a_failed_build_warns_once_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMPRUNE_KERNELS_NATIVE", raising=False)
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(RuntimeWarning, match="slower PyTorch ways are used: .*no such thing"):
        assert not native.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.is_available()
    assert list((tmp_path / "cache" / "native").iterdir()) == []


@pytest.mark.usefixtures("_unbuilt")
def test_without_a_compiler_it_warns_and_is_not_available(monkeypatch):
    monkeypatch.delenv("LLMPRUNE_KERNELS_NATIVE", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
        assert not native.is_available()


@pytest.mark.usefixtures("_unbuilt")
def test_a_cache_folder_that_cannot_be_made_warns(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMPRUNE_KERNELS_NATIVE", raising=False)
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.warns(RuntimeWarning, match="LLMPRUNE_CACHE"):
        assert not native.is_available()


@needs_compiler
@pytest.mark.slow
def test_processes_that_build_at_one_time_all_get_a_library(tmp_path):
    code = "from llmprune_kernels import native; assert native.is_available()"
    environment = {**os.environ, "LLMPRUNE_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(native.__file__).parents[1])
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=environment)
        for _ in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("_unbuilt")
def test_a_damaged_file_in_the_cache_is_built_again():
    native_build.load()
    (path,) = native_build._folder().iterdir()
    path.unlink()
    path.write_bytes(b"not a library")
    assert native_build.load().llmprune_instruction_set() >= 0
