"""BlockSparseLinear and BlockSparseMLP: layers that store only the blocks of their weights."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from llmprune_kernels.bsr import BlockIndex, check_block, gather_blocks, scatter_blocks
from llmprune_kernels.dispatch import Choice, choose_backend
from llmprune_kernels.ops import block_sparse_linear, block_sparse_swiglu, is_watched
from llmprune_kernels.prepared import PreparedProduct, run_prepared
from llmprune_kernels.work import Work

# What a state dict holds of an index; the rest follows from it.
SAVED = ("row_ptr", "col")


class BlockSparseLinear(nn.Module):
    """A linear layer of which only some blocks of the weight are stored.

    Attributes:
        values: The stored blocks, shape (num_blocks, rows, columns).
        bias: Shape (out_features,), or None.
        block: (rows, columns) of a block.
    """

    row_ptr: Tensor
    col: Tensor
    dense: Tensor | None
    _prepared: PreparedProduct | None = None

    def __init__(
        self,
        index: BlockIndex,
        block: tuple[int, int],
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Blocks of zeros; fill them, or use `from_dense`.

        Args:
            index: Which blocks are stored; also says the device.
            block: Sides of a block, each of 16, 32, 64 or 128.
            bias: Whether there is one.
            dtype: Of blocks and bias; the default one by default.

        Raises:
            ValueError: A side that kernels don't know.
        """
        super().__init__()
        self.block = (int(block[0]), int(block[1]))
        self.out_features = index.block_rows * self.block[0]
        self.in_features = index.block_columns * self.block[1]
        check_block(self.block, self.out_features, self.in_features)
        device = index.row.device
        shape = (index.num_blocks, *self.block)
        self.values = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        self.bias = (
            nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
            if bias
            else None
        )
        for name, tensor in index.tensors().items():
            self.register_buffer(name, tensor, persistent=name in SAVED)
        self.max_per_row, self.max_per_column = index.max_per_row, index.max_per_column
        self.register_buffer("dense", None, persistent=False)

    @staticmethod
    def from_dense(linear: nn.Linear, keep_mask: Tensor) -> BlockSparseLinear:
        """The layer with the kept blocks of a dense one; the rest of its weight is dropped.

        Args:
            linear: Weight (out_features, in_features); left as it is.
            keep_mask: Bool, shape (out_features / rows, in_features / columns), True = stored.

        Raises:
            ValueError: The mask is not bool, or does not cut the weight into blocks of known sides.
        """
        weight = linear.weight.detach()
        if keep_mask.dim() != 2 or any(
            not count or size % count
            for size, count in zip(weight.shape, keep_mask.shape, strict=True)
        ):
            raise ValueError(
                f"keep_mask must cut a weight of {weight.shape[0]}x{weight.shape[1]} into equal "
                f"blocks, got {tuple(keep_mask.shape)} blocks"
            )
        block = (
            weight.shape[0] // keep_mask.shape[0],
            weight.shape[1] // keep_mask.shape[1],
        )
        index = BlockIndex.from_mask(keep_mask.to(weight.device))
        layer = BlockSparseLinear(index, block, bias=linear.bias is not None, dtype=weight.dtype)
        with torch.no_grad():
            layer.values.copy_(gather_blocks(weight, index, block))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A dense layer with zeros where no block is stored; a copy."""
        with torch.device(self.values.device):
            linear = nn.Linear(
                self.in_features,
                self.out_features,
                bias=self.bias is not None,
                dtype=self.values.dtype,
            )
        with torch.no_grad():
            linear.weight.copy_(scatter_blocks(self.values, self.index))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    @property
    def index(self) -> BlockIndex:
        """Where the blocks are."""
        # read as attributes of a module they would take three times as long
        buffers: dict[str, Any] = self._buffers
        return BlockIndex(
            buffers["row_ptr"],
            buffers["col"],
            buffers["row"],
            buffers["t_ptr"],
            buffers["t_row"],
            buffers["t_idx"],
            self.max_per_row,
            self.max_per_column,
        )

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + bias; x has shape (..., in_features)."""
        if x.is_cpu and not is_watched():
            y = run_prepared(self, (self,), x)
            if y is not None:
                return y
        if self.dense is not None:
            return functional.linear(x, self.dense, self.bias)
        return block_sparse_linear(x, self.values, self.index, self.bias)

    def keep_dense(self) -> None:
        """Multiply by a dense copy from now on, where blocks would be slower; takes its memory.

        The copy does not follow the blocks; `train()` and `load_state_dict` drop it.
        """
        self.dense = scatter_blocks(self.values.detach(), self.index)

    def train(self, mode: bool = True) -> BlockSparseLinear:
        """As `nn.Module.train`; a dense copy is dropped before blocks change."""
        if mode:
            self.dense = None
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> BlockSparseLinear:
        """As `nn.Module._apply`; a dense copy that one kind of device asked for is dropped."""
        self._prepared = None
        was = self.values.device.type
        super()._apply(*arguments, **options)
        if self.values.device.type != was:
            self.dense = None
        return self

    def choice(self, num_rows: int) -> Choice:
        """Which backend a call on `num_rows` rows runs now, and why."""
        if self.dense is not None:
            return Choice("densify", "a dense copy is kept", 1.0)
        return choose_backend(
            Work(
                device=self.values.device.type,
                dtype=self.values.dtype,
                num_rows=num_rows,
                in_features=self.in_features,
                out_features=self.out_features,
                block=self.block,
                density=self.index.density,
                threads=torch.get_num_threads(),
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def extra_repr(self) -> str:
        """What `print` shows."""
        rows, columns = self.block
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block={rows}x{columns}, density={self.index.density:.3f}, "
            f"bias={self.bias is not None}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take values and index; what follows from the index is built again."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.dense = None
        shape = torch.tensor(
            [self.out_features // self.block[0], self.in_features // self.block[1]]
        )
        saved = {
            "row_ptr": self.row_ptr.cpu(),
            "col": self.col[: self.values.shape[0]].cpu(),
            "shape": shape,
        }
        index = BlockIndex.from_saved(saved, name=f"{prefix}index").to(self.row_ptr.device)
        for name, tensor in index.tensors().items():
            setattr(self, name, tensor)
        self.max_per_row, self.max_per_column = index.max_per_row, index.max_per_column


class BlockSparseMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with the first two products fused; at best all three."""

    _prepared: PreparedProduct | None = None

    def __init__(
        self, gate_proj: BlockSparseLinear, up_proj: BlockSparseLinear, down_proj: nn.Module
    ) -> None:
        """Takes the layers over.

        Raises:
            ValueError: Gate or up has a bias, or their shapes differ.
        """
        super().__init__()
        if gate_proj.bias is not None or up_proj.bias is not None:
            raise ValueError("gate_proj and up_proj must have no bias to be fused")
        if gate_proj.out_features != up_proj.out_features:
            raise ValueError(
                f"gate_proj and up_proj must have equally many out_features, got "
                f"{gate_proj.out_features} and {up_proj.out_features}"
            )
        self.gate_proj: nn.Module = gate_proj
        self.up_proj: nn.Module = up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., hidden_size) in and out."""
        if x.is_cpu and not is_watched():
            y = self._at_once(x)
            if y is not None:
                return y
        gate, up = self.gate_proj, self.up_proj
        if _has_blocks(gate) and _has_blocks(up):
            joined = block_sparse_swiglu(x, gate.values, gate.index, up.values, up.index)
        else:
            # one of them was made dense again, or keeps a dense copy
            joined = functional.silu(gate(x)) * up(x)
        return self.down_proj(joined)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """All three products in one call of C++; None where one is not for it, or is watched."""
        modules: dict[str, Any] = self._modules
        layers = (modules["gate_proj"], modules["up_proj"], modules["down_proj"])
        for layer in layers:
            if type(layer) is not BlockSparseLinear:
                return None
        return None if _is_hooked(layers[2]) else run_prepared(self, layers, x)

    def _apply(self, *arguments: Any, **options: Any) -> BlockSparseMLP:
        """As `nn.Module._apply`; memory of weights that move is not kept."""
        self._prepared = None
        super()._apply(*arguments, **options)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


def _has_blocks(layer: nn.Module) -> TypeGuard[BlockSparseLinear]:
    return isinstance(layer, BlockSparseLinear) and layer.dense is None


def _is_hooked(layer: nn.Module) -> bool:
    """Whether more than its class's forward runs when the layer is called."""
    return bool(
        "forward" in layer.__dict__
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or has_any_global_hook()
    )
