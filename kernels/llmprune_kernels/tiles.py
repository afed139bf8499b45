"""Tile: how a kernel is cut for a GPU; and the tables that say which tile for which problem.

A table is a JSON file `{"device", "measured", "note", "tiles": [entry, ...]}`. An entry holds
"kind", "dtype" ("half" or "float"), "tile", where it was measured "us" and "dense_us", and any of
"arch" (a list), "block" ([rows, columns], null = any) and the numbers "tokens", "out_features",
"in_features", "density". Of the entries that fit, the one nearest in those numbers (sum of |log2|
of the ratios) is taken. The user's table of the device is asked first, then the shipped one of the
device, then those of other devices of its architecture, then the shipped default, which nobody
measured. The first table with an entry that fits answers; tables are read once a process.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llmprune_kernels.bsr import BlockIndex

Kind = Literal["matmul", "tma", "decode", "swiglu", "grad_input", "grad_values"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SHIPPED = Path(__file__).with_name("tables")
TABLES_VARIABLE = "LLMPRUNE_KERNELS_TABLES"
# bytes of shared memory a program may ask for, CUDA programming guide, "compute capabilities"
SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
# architectures with the bulk copy engine
BULK_COPY_ARCHS = ("sm_90", "sm_100", "sm_103", "sm_120")
SMALLEST_SHARED_BYTES = 64 << 10
# beyond this many tokens a weight tile is no longer the larger operand of the decode kernel
MAX_DECODE_TOKENS = 64
# beyond this the sums that items write and read outweigh what they share
MOST_PROMPT_ITEMS = 8
NUMBERS = ("tokens", "out_features", "in_features", "density")
# what an entry with a dense product's time must have
TIMED = ("us", "dense_us", "tokens", "density")


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        block_m: Tokens of one program (in grad_values: tokens of one step).
        num_warps: Warps of one program.
        num_stages: Depth of the software pipeline.
        step: Inner size of one dot; narrower blocks are merged up to it.
        group: Token tiles that visit all block rows before the next group begins.
        items: How many programs share a block row's blocks in decode and tma, 0 = chosen from the
            problem.
        rows: Rows of a block of one program in decode, 0 = all.
        swap: Whether the weights are the left operand of a prefill kernel's dot.
        persistent: Whether tma's programs stay for several tiles, where rows are equally full and
            no gate is read.
    """

    block_m: int
    num_warps: int
    num_stages: int
    step: int = 64
    group: int = 8
    items: int = 0
    rows: int = 0
    swap: bool = False
    persistent: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "num_warps", "step"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"tile: {name} must be a power of two, got {size}")
        if self.rows and (self.rows < 16 or self.rows & (self.rows - 1)):
            raise ValueError(f"tile: rows must be 0 or a power of two from 16 on, got {self.rows}")
        if self.num_stages < 1 or self.group < 1 or self.items < 0 or self.step < 16:
            raise ValueError(
                f"tile: num_stages and group must be at least 1, items 0, step 16, got {self}"
            )

    def options(self) -> dict[str, int]:
        """What Triton's launcher takes beside the kernel's own arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Problem:
    """One product: sizes in elements, `density` the stored share in [0, 1]."""

    tokens: int
    out_features: int
    in_features: int
    density: float
    block: tuple[int, int]
    dtype: torch.dtype

    @property
    def stored(self) -> float:
        """Numbers in the stored blocks."""
        return self.density * self.out_features * self.in_features

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored blocks, without the index."""
        return round(self.stored) * self.dtype.itemsize


@dataclass(frozen=True)
class Device:
    """A GPU as tables know it: its name, architecture ("sm_90") and number of processors."""

    name: str
    arch: str
    num_processors: int

    @property
    def slug(self) -> str:
        """Its name as a file's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@cache
def device_of(device: torch.device) -> Device:
    """The GPU behind a torch device; a stand-in for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return Device("interpreter", "sm_90", 132)
    found = torch.cuda.get_device_properties(device)
    arch = arch_of(found, is_amd=torch.version.hip is not None)
    return Device(found.name, arch, found.multi_processor_count)


def arch_of(properties: Any, *, is_amd: bool) -> str:
    """The architecture as tables name it, from a device's properties."""
    # a build for CUDA has gcnArchName too, and gives the card's name for it
    if is_amd:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def choose_for(kind: Kind, values: Tensor, index: BlockIndex, num_tokens: int) -> Tile:
    """The tile for a launch; tokens and density are rounded so that few answers are looked up."""
    block = (values.shape[1], values.shape[2])
    problem = Problem(
        tokens=1 << max(0, num_tokens - 1).bit_length(),
        out_features=index.block_rows * block[0],
        in_features=index.block_columns * block[1],
        density=round(index.density, 2),
        block=block,
        dtype=values.dtype,
    )
    return choose_tile(kind, device_of(values.device), problem)


@cache
def choose_tile(kind: Kind, device: Device, problem: Problem) -> Tile:
    """The nearest entry's tile of the first table that has one, made to fit the GPU."""
    for table in tables(device):
        tile = nearest_tile(table, kind, problem, device.arch)
        if tile is not None:
            return fit(kind, tile, problem, device)
    raise ValueError(f"no table has a {kind} tile for {problem}; the default table must")


def tables(device: Device) -> list[dict[str, Any]]:
    """The tables to ask, in order; a file that is not there is passed over."""
    own = SHIPPED / f"tiles-{device.slug}.json"
    found = [read_table(path) for path in (user_table(device), own) if path.exists()]
    others = [read_table(path) for path in sorted(SHIPPED.glob("tiles-*.json")) if path != own]
    found += [table for table in others if table.get("arch") == device.arch]
    default = SHIPPED / "default.json"
    return [*found, read_table(default)] if default.exists() else found


def user_table(device: Device) -> Path:
    """Where `tune` writes for a device: a cache folder, or the one that the variable names."""
    named = os.environ.get(TABLES_VARIABLE)
    folder = Path(named) if named else Path.home() / ".cache" / "llmprune_kernels"
    return folder / f"tiles-{device.slug}.json"


def read_table(path: Path) -> dict[str, Any]:
    """A table's content.

    Raises:
        ValueError: It is no table: the message names the file and the entry.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        entries = table["tiles"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: must be a JSON object with 'tiles', got {error!r}") from error
    for number, entry in enumerate(entries):
        try:
            known = entry["kind"] in KINDS and entry["dtype"] in ("half", "float")
            Tile(**entry["tile"])
            if "dense_us" in entry and min(entry[name] for name in TIMED) <= 0:
                raise ValueError(f"{', '.join(TIMED)} must be above 0")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: tiles[{number}]: {error}") from error
        if not known:
            raise ValueError(f"{path}: tiles[{number}]: unknown kind or dtype in {entry}")
    return table


def nearest_tile(table: dict[str, Any], kind: Kind, problem: Problem, arch: str) -> Tile | None:
    """The tile of the nearest entry of this kind, dtype, block and arch; None if there is none."""
    fitting = fitting_entries(table, kind, problem, arch)
    if not fitting:
        return None
    return Tile(**min(fitting, key=lambda entry: distance(entry, problem))["tile"])


def fitting_entries(
    table: dict[str, Any], kind: Kind, problem: Problem, arch: str
) -> list[dict[str, Any]]:
    """The entries of a table of this kind, dtype, block and arch."""
    width = "float" if problem.dtype == torch.float32 else "half"
    return [
        entry
        for entry in table["tiles"]
        if (entry["kind"], entry["dtype"]) == (kind, width)
        and arch in entry.get("arch", [arch])
        and _has_block(entry, problem.block)
    ]


def distance(entry: dict[str, Any], problem: Problem) -> float:
    """How far an entry is from a problem: the sum of |log2| of the ratios of its numbers."""
    named = [name for name in NUMBERS if name in entry]
    got = [max(getattr(problem, name), 1e-3) for name in named]
    return sum(
        abs(math.log2(number / max(entry[name], 1e-3)))
        for name, number in zip(named, got, strict=True)
    )


def fit(kind: Kind, tile: Tile, problem: Problem, device: Device) -> Tile:
    """The tile with fewer stages, then fewer tokens, until its buffers fit in shared memory.

    For decode also: as many token columns as there are tokens. For decode and tma: a number of
    items.
    """
    if kind == "decode" and tile.block_m < problem.tokens:
        tile = replace(tile, block_m=max(8, problem.tokens))
    if kind == "decode" and not tile.items:
        tile = replace(tile, items=_items(problem, device, tile.rows))
    limit = SHARED_BYTES.get(device.arch, SMALLEST_SHARED_BYTES)
    while shared_bytes(kind, tile, problem.block, problem.dtype) > limit:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_m > 16 and kind != "decode":
            tile = replace(tile, block_m=tile.block_m // 2)
        elif tile.step > 16:
            tile = replace(tile, step=tile.step // 2)
        else:
            break
    return replace(tile, items=prompt_items(tile, problem, device)) if kind == "tma" else tile


def shared_bytes(kind: Kind, tile: Tile, block: tuple[int, int], dtype: torch.dtype) -> int:
    """Shared memory of the pipeline's buffers: both operands of a step, `num_stages` deep."""
    rows, columns = block
    if kind == "grad_input":
        sides, step = tile.block_m + columns, tile.step
    elif kind == "grad_values":
        # a step is block_m tokens; the tile is merged columns by the block's rows
        sides, step = rows + max(tile.step, columns), tile.block_m
    else:
        if kind == "decode" and tile.rows:
            rows = min(rows, tile.rows)
        # swiglu with one pattern for both has two weight tiles in flight
        sides, step = tile.block_m + rows * (2 if kind == "swiglu" else 1), tile.step
        if kind == "tma" and (step < 2 * columns or tile.persistent):
            step = min(step, columns)
    size = tile.num_stages * sides * step * dtype.itemsize
    if tile.persistent:
        # half a tile at a time passes to y while the buffers are in use: Triton 3.6 to 3.9
        size += tile.block_m * rows * dtype.itemsize // 2
    return size


def num_programs(tile: Tile, values: Tensor, num_tiles: int) -> int:
    """Programs that stay: as many as are at work at once, but no more than tiles.

    By shared memory, and by registers: two programs of four warps hold the sums of one of eight.
    """
    device = device_of(values.device)
    block = (values.shape[1], values.shape[2])
    limit = SHARED_BYTES.get(device.arch, SMALLEST_SHARED_BYTES)
    by_memory = limit // shared_bytes("tma", tile, block, values.dtype)
    each = max(1, min(by_memory, 8 // tile.num_warps))
    return min(num_tiles, each * device.num_processors)


def _has_block(entry: dict[str, Any], block: tuple[int, int]) -> bool:
    wanted = entry.get("block", (None, None))
    return all(side is None or side == got for side, got in zip(wanted, block, strict=True))


def _items(problem: Problem, device: Device, part: int) -> int:
    """Items of a row: four programs for every processor, but none under 256 inner elements.

    An item writes 4 bytes for every token and feature and reads 2 for every inner element and
    feature, so at 16 tokens a shorter item would spend over an eighth of its bytes on partials.
    A row's parts are programs of their own, and cost less than items do: where there are two for
    every processor, rows are not shared.
    """
    parts = problem.out_features / min(part or problem.block[0], problem.block[0])
    if part and parts >= 2 * device.num_processors:
        return 1
    shortest = max(1, int(problem.density * problem.in_features / 256))
    return min(max(1, math.ceil(4 * device.num_processors / parts)), shortest)


def prompt_items(tile: Tile, problem: Problem, device: Device) -> int:
    """Items of a tile of many tokens: as many as are all at work at once.

    What a measured table asks for holds where two fit on a processor; where it asks for none, one
    on each is the limit. Sums of an item are written and read, 8 bytes for every token and feature,
    so an item has at least 512 inner elements, or 256 where it was measured so.
    """
    if tile.persistent:
        return 1
    num_tiles = math.ceil(problem.tokens / tile.block_m) * problem.out_features // problem.block[0]
    shortest = 256 if tile.items else 512
    longest = max(1, int(problem.density * problem.in_features / shortest))
    at_once = (2 if tile.items else 1) * device.num_processors // max(1, num_tiles)
    return max(1, min(tile.items or MOST_PROMPT_ITEMS, at_once, longest))
