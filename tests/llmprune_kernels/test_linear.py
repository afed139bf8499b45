import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmprune_kernels import BlockIndex, BlockSparseLinear, BlockSparseMLP
from tests.llmprune_kernels.cases import MASKS, mask_of

ROOT = Path(__file__).parents[2]


def dense_linear(bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4 * 16, 5 * 32, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(MASKS))
def test_it_computes_what_the_masked_layer_does_and_goes_back(name, bias):
    linear, mask = dense_linear(bias), mask_of(name)
    sparse = BlockSparseLinear.from_dense(linear, mask)
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    masked = linear.weight * mask.repeat_interleave(32, 0).repeat_interleave(16, 1)
    wanted = nn.functional.linear(x, masked, linear.bias)
    torch.testing.assert_close(sparse(x), wanted)
    dense = sparse.to_dense()
    assert torch.equal(dense.weight, masked)
    torch.testing.assert_close(dense(x), wanted)
    assert sparse.block == (32, 16)


def test_it_takes_its_block_from_the_mask_and_refuses_one_that_does_not_fit():
    with pytest.raises(ValueError, match=r"must cut a weight of 160x64 .* got \(3, 4\) blocks"):
        BlockSparseLinear.from_dense(dense_linear(), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="sides must be two of"):
        BlockSparseLinear.from_dense(dense_linear(), torch.ones(20, 4, dtype=torch.bool))


def test_it_survives_a_file(tmp_path):
    sparse = BlockSparseLinear.from_dense(dense_linear(), mask_of("half"))
    save_file(sparse.state_dict(), tmp_path / "layer.safetensors")
    assert set(sparse.state_dict()) == {"values", "bias", "row_ptr", "col"}
    # another layer with as many blocks in other places
    other = BlockSparseLinear(
        BlockIndex.from_mask(mask_of("half").flip(0)), (32, 16), dtype=torch.float64
    )
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(other(x), sparse(x))
    # what follows from the index followed
    slopes = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in (other, sparse)]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_a_state_that_breaks_the_index_is_refused():
    sparse = BlockSparseLinear.from_dense(dense_linear(), mask_of("half"))
    state = sparse.state_dict()
    state["col"] = torch.full_like(state["col"], 9)
    with pytest.raises(ValueError, match="columns must be in"):
        sparse.load_state_dict(state)


def test_it_trains():
    torch.manual_seed(1)
    sparse = BlockSparseLinear.from_dense(dense_linear(dtype=torch.float32), mask_of("half"))
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.02)
    x, wanted = torch.randn(32, 64), torch.randn(32, 160)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (sparse(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_it_says_what_runs_and_why():
    choice = BlockSparseLinear.from_dense(dense_linear(), mask_of("half")).choice(8)
    assert choice.backend in ("native", "pytorch", "densify")
    assert "density 0.50" in choice.reason


def test_a_dense_copy_is_kept_until_the_blocks_may_change():
    sparse = BlockSparseLinear.from_dense(dense_linear(), mask_of("half")).eval()
    x = torch.randn(4, 64, dtype=torch.float64)
    wanted = sparse(x)
    sparse.keep_dense()
    torch.testing.assert_close(sparse(x), wanted)
    assert sparse.choice(4).backend == "densify"
    assert "dense" not in sparse.state_dict()
    sparse.train()
    assert sparse.dense is None
    sparse.eval().keep_dense()
    state = {
        name: 2 * value if name in ("values", "bias") else value
        for name, value in sparse.state_dict().items()
    }
    sparse.load_state_dict(state)
    torch.testing.assert_close(sparse(x), 2 * wanted)


def test_a_fused_mlp_is_the_mlp():
    torch.manual_seed(0)
    gate, up = dense_linear(bias=False), dense_linear(bias=False, seed=1)
    down = nn.Linear(160, 64, bias=False, dtype=torch.float64)
    sparse = [BlockSparseLinear.from_dense(one, mask_of("half")) for one in (gate, up)]
    mlp = BlockSparseMLP(*sparse, down)
    x = torch.randn(6, 64, dtype=torch.float64)
    wanted = down(nn.functional.silu(sparse[0](x)) * sparse[1](x))
    torch.testing.assert_close(mlp(x), wanted)
    mlp.gate_proj = sparse[0].to_dense()
    torch.testing.assert_close(mlp(x), wanted)


def test_a_fused_mlp_takes_no_bias():
    sparse = BlockSparseLinear.from_dense(dense_linear(), mask_of("half"))
    with pytest.raises(ValueError, match="must have no bias"):
        BlockSparseMLP(sparse, sparse, nn.Identity())


def test_the_package_needs_neither_llmprune_nor_transformers():
    code = (
        "import sys, torch; from llmprune_kernels import BlockSparseLinear;"
        "layer = BlockSparseLinear.from_dense(torch.nn.Linear(32, 32), torch.eye(2).bool());"
        "layer(torch.randn(2, 32)).sum().backward();"
        "sys.exit(any(name in sys.modules for name in ('llmprune', 'transformers')))"
    )
    subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        env={"PYTHONPATH": str(ROOT / "kernels"), "LLMPRUNE_KERNELS_NATIVE": "0"},
    )
