import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmprune_kernels import block_sparse_linear, block_sparse_swiglu, reference
from llmprune_kernels.dispatch import BACKENDS, OVERRIDE
from tests.llmprune_kernels.cases import MASKS, problem

CPU_BACKENDS = [name for name in BACKENDS if name != "triton"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [None, *CPU_BACKENDS])
@pytest.mark.parametrize("name", list(MASKS))
def test_every_backend_computes_the_definition(monkeypatch, name, backend):
    if backend:
        monkeypatch.setenv(OVERRIDE, backend)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        x, values, index, bias = problem(name, (32, 16), 7, dtype)
        wanted = reference.exact(x, values, index, bias)
        got = block_sparse_linear(x, values, index, bias)
        assert got.dtype == dtype
        assert got.shape == (7, 160)
        assert reference.relative_error(got, wanted) < tolerance


def test_leading_dimensions_and_strides_do_not_matter():
    x, values, index, bias = problem("half", (16, 16), 12, torch.float64)
    wanted = block_sparse_linear(x, values, index, bias)
    folded = block_sparse_linear(x.view(3, 4, -1), values, index, bias)
    assert torch.equal(folded.flatten(0, 1), wanted)
    spread = torch.stack([x, x], -1)[..., 0]
    assert not spread.is_contiguous()
    torch.testing.assert_close(block_sparse_linear(spread, values, index, bias), wanted)
    torch.testing.assert_close(block_sparse_linear(x[0], values, index, bias), wanted[0])
    assert block_sparse_linear(x[:0], values, index, bias).shape == (0, 80)


@pytest.mark.parametrize("name", ["half", "an empty row and column", "none"])
def test_gradients_are_those_of_the_definition(name):
    """T: gradcheck in float64 for x, values and bias."""
    x, values, index, bias = problem(name, (16, 16), 3)
    inputs = [one.requires_grad_() for one in (x, values, bias)]

    def product(x, values, bias):
        return block_sparse_linear(x, values, index, bias)

    assert torch.autograd.gradcheck(product, inputs, fast_mode=True)
    weights = torch.randn(3, 80, dtype=torch.float64)
    got = torch.autograd.grad((product(*inputs) * weights).sum(), inputs)
    wanted = torch.autograd.grad((reference.linear(x, values, index, bias) * weights).sum(), inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tied", [True, False])
def test_swiglu_and_its_gradients_are_those_of_the_definition(tied):
    x, gate, gate_index, _ = problem("half", (16, 32), 5, seed=1)
    other = "half" if tied else "an empty row and column"
    _, up, up_index, _ = problem(other, (16, 32), 5, seed=2)
    up_index = gate_index if tied else up_index
    inputs = [one.requires_grad_() for one in (x, gate, up)]

    def fused(x, gate, up):
        return block_sparse_swiglu(x, gate, gate_index, up, up_index)

    torch.testing.assert_close(fused(*inputs), reference.swiglu(x, gate, gate_index, up, up_index))
    assert torch.autograd.gradcheck(fused, inputs, fast_mode=True)


def flat(index):
    return (*index.tensors().values(), index.max_per_row, index.max_per_column)


def test_the_operators_keep_the_rules_of_torch():
    x, values, index, bias = problem("half", (16, 16), 3)
    inputs = (x.requires_grad_(), values.requires_grad_(), bias.requires_grad_(), *flat(index))
    torch.library.opcheck(torch.ops.llmprune.block_sparse_linear, inputs)
    dy = torch.randn(3, 80, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.llmprune.block_sparse_grad_input, (dy, values.detach(), *flat(index))
    )
    torch.library.opcheck(
        torch.ops.llmprune.block_sparse_grad_values, (dy, x.detach(), 16, 16, *flat(index))
    )
    pair = (x, values, values.clone().requires_grad_(), *flat(index), *flat(index))
    torch.library.opcheck(torch.ops.llmprune.block_sparse_swiglu, pair)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        _, values, self.index, bias = problem("half", (16, 16), 1, torch.float32)
        self.values, self.bias = nn.Parameter(values), nn.Parameter(bias)

    def forward(self, x):
        return torch.relu(block_sparse_linear(x, self.values, self.index, self.bias)) * 2


@pytest.mark.slow
def test_it_compiles_whole_with_any_number_of_rows_and_trains():
    module = Two()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for rows in (3, 9, 1):
        x = torch.randn(rows, 64, requires_grad=True)
        wanted, got = module(x), compiled(x)
        torch.testing.assert_close(got, wanted)
        slopes = [torch.autograd.grad(y.sum(), [x, module.values]) for y in (wanted, got)]
        torch.testing.assert_close(slopes[1], slopes[0])


@pytest.mark.slow
def test_an_exported_program_keeps_the_operator():
    module = Two()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (torch.randn(4, 64),), dynamic_shapes=({0: rows},))
    assert "llmprune.block_sparse_linear" in str(program.graph)
    x = torch.randn(11, 64)
    torch.testing.assert_close(program.module()(x), module(x))


def test_autocast_runs_it_in_its_dtype():
    x, values, index, bias = problem("half", (16, 16), 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = block_sparse_linear(x, values, index, bias)
    assert got.dtype == torch.bfloat16
    wanted = reference.exact(x, values, index, bias)
    assert reference.relative_error(got, wanted) < 2e-2


def test_flops_count_stored_blocks_alone():
    x, values, index, _ = problem("half", (16, 16), 6, torch.float32)
    x.requires_grad_()
    values.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        block_sparse_linear(x, values, index).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * values.numel()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda x, v: (x[:, :-1], v), "x must end in 64 features"),
        (lambda x, v: (x, v[1:]), "values must hold 10 blocks"),
        (lambda x, v: (x.float(), v), "must share a dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, rule):
    x, values, index, _ = problem("half", (16, 16), 3)
    with pytest.raises(ValueError, match=rule):
        block_sparse_linear(*change(x, values), index)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "magic")
    with pytest.raises(ValueError, match=r"must be one of reference, .*got 'magic'"):
        block_sparse_linear(*problem("half", (16, 16), 3)[:3])
