"""Kernels compiled for GPUs that are not here, and what can be read from the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmprune_kernels import decode, gradients, matmul, persistent, swiglu, tma
from llmprune_kernels.tiles import Tile

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INDEX_POINTERS = {"row_ptr", "col_ptr", "t_ptr", "t_row_ptr", "t_idx_ptr", "row_index_ptr"}
INDEX_POINTERS |= {"gate_row_ptr", "gate_col_ptr", "up_row_ptr", "up_col_ptr"}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Compiled:
    """One kernel for one architecture ("sm_90" or "gfx942").

    Args:
        kernel: The `@triton.jit` function.
        arch: The architecture.
        constants: Its compile-time numbers.
        dtype: Triton's name of the operands' dtype ("fp16", "bf16", "fp32").
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline.
        types: Types of arguments that are neither plain pointers nor int32.
        aligned: Sizes that are multiples of 16, beside all pointers and strides.
    """

    def __init__(
        self,
        kernel: Any,
        arch: str,
        constants: dict[str, Any],
        *,
        dtype: str,
        num_warps: int,
        num_stages: int,
        types: dict[str, str] | None = None,
        aligned: tuple[str, ...] = (),
    ) -> None:
        self.arch = arch
        self.num_stages = num_stages
        self.is_gated = bool(constants.get("HAS_GATE"))
        self.is_shared = constants.get("ITEMS", 1) > 1
        types = types or {}
        signature, attrs, given = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                given[name] = constants[name]
                continue
            signature[name] = types.get(name) or _plain_type(name, dtype)
            if name.endswith(("_ptr", "_stride")) or name in aligned:
                attrs[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=attrs)
        self.binary = triton.compile(
            source,
            target=_target(arch),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )

    @property
    def shared_bytes(self) -> int:
        return self.binary.metadata.shared

    @property
    def ptx(self) -> str:
        return self.binary.asm["ptx"]

    @property
    def buffers(self) -> list[int]:
        """How many steps deep every pipelined operand is."""
        pattern = r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x"
        return [int(depth) for depth in re.findall(pattern, self.binary.asm["ttgir"])]

    @property
    def waits(self) -> list[int]:
        """How many groups of copies may still be under way where the code waits for one."""
        return [int(count) for count in re.findall(r"cp\.async\.wait_group\s+(\d+)", self.ptx)]

    @cached_property
    def assembler_log(self) -> str:
        """What ptxas says of registers, spills and serialized matrix instructions."""
        newer = int(self.arch.removeprefix("sm_")) >= 90
        name = f"{self.arch}a" if newer else self.arch
        tool = NVIDIA / ("ptxas-blackwell" if newer else "ptxas")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.ptx"
            file.write_text(self.ptx)
            command = [tool, "-v", "--gpu-name", name, file, "-o", Path(folder) / "kernel.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    @cached_property
    def stack_bytes(self) -> int:
        """Bytes of local memory a thread: more than 0 is a spill."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            command = [NVIDIA / "cuobjdump", "--dump-resource-usage", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return max(int(size) for size in re.findall(r"STACK:(\d+)", done.stdout))

    @property
    def registers(self) -> int:
        return max(int(count) for count in re.findall(r"Used (\d+) registers", self.assembler_log))

    @property
    def uses_atomics(self) -> bool:
        return re.search(r"^\s*(@%\w+ )?(atom|red)\.", self.ptx, re.MULTILINE) is not None

    def count(self, instruction: str) -> int:
        """Lines of PTX (or AMD assembly) that name an instruction."""
        text = self.binary.asm["amdgcn" if self.arch.startswith("gfx") else "ptx"]
        return sum(instruction in line for line in text.splitlines())


def _target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _plain_type(name: str, dtype: str) -> str:
    if name in INDEX_POINTERS:
        return "*i32"
    if name == "partial_ptr":
        return "*fp32"
    if name == "done_ptr":
        return "*i32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"


def launches(
    kind: str, tile: Tile, block: tuple[int, int], dtype: torch.dtype
) -> list[tuple[str, Any, dict[str, Any], dict[str, str]]]:
    """What launchers of a kind run with a tile: (name, kernel, constants, types), bias included."""
    merged = tile.step > block[1]
    if kind == "matmul":
        constants = matmul.constants(tile, block, dtype, ragged=merged) | {"HAS_BIAS": True}
        return [("matmul", matmul.linear_kernel, constants, {})]
    if kind == "tma":
        constants = tma.constants(tile, block, dtype, paired=merged)
        constants |= {"HAS_BIAS": True, "EVEN": merged}
        box = f"{NAMES[dtype]}[{{}},{constants['STEP']}]"
        types = {
            "x_tensor": f"tensordesc<{box.format(tile.block_m)}>",
            "values_tensor": f"tensordesc<{box.format(block[0])}>",
        }
        if tile.persistent:
            constants = {k: v for k, v in constants.items() if k not in ("PAIRS", "EVEN")}
            return [("persistent", persistent.persistent_kernel, constants, types)]
        return [
            ("tma", tma.tma_kernel, constants | {"HAS_GATE": False, "ITEMS": 1}, types),
            ("tma gated", tma.tma_kernel, constants | {"HAS_GATE": True, "ITEMS": 1}, types),
            ("tma shared", tma.tma_kernel, constants | {"HAS_GATE": False, "ITEMS": 2}, types),
        ]
    if kind == "decode":
        constants = decode.constants(tile, block, dtype)
        constants |= {"BN": block[0], "RAGGED": merged, "EVEN": not merged}
        alone = constants | {"PARTIAL": True, "HAS_BIAS": True}
        whole = constants | {"EVEN": True, "RAGGED": False, "PARTIAL": False, "HAS_BIAS": False}
        return [
            ("decode", decode.item_kernel, alone, {"out_ptr": "*fp32"}),
            ("decode, whole and balanced", decode.item_kernel, whole, {}),
            ("swiglu decode", swiglu.swiglu_item_kernel, constants, {}),
            ("swiglu decode, whole", swiglu.swiglu_whole_kernel, constants, {}),
        ]
    if kind == "swiglu":
        constants = matmul.constants(tile, block, dtype, ragged=merged)
        return [
            ("swiglu tied", swiglu.swiglu_kernel, constants | {"TIED": True}, {}),
            ("swiglu", swiglu.swiglu_kernel, constants | {"TIED": False}, {}),
        ]
    if kind == "grad_input":
        constants = gradients.input_constants(tile, block, dtype)
        return [("grad_input", gradients.grad_input_kernel, constants, {})]
    constants = gradients.values_constants(tile, block, dtype)
    return [("grad_values", gradients.grad_values_kernel, constants, {})]
