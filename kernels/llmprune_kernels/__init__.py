"""Linear layers of which only blocks of the weights are stored; needs torch, and triton on GPUs."""

from llmprune_kernels.bsr import BlockIndex, gather_blocks, scatter_blocks
from llmprune_kernels.dispatch import Choice, choose_backend
from llmprune_kernels.linear import BlockSparseLinear, BlockSparseMLP
from llmprune_kernels.ops import block_sparse_linear, block_sparse_swiglu

__all__ = [
    "BlockIndex",
    "BlockSparseLinear",
    "BlockSparseMLP",
    "Choice",
    "block_sparse_linear",
    "block_sparse_swiglu",
    "choose_backend",
    "gather_blocks",
    "scatter_blocks",
]
