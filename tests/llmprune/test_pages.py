"""Pages of mapped weight files: given back without a byte lost, and nothing else touched."""

import mmap
import sys

import pytest
import torch

from llmprune import pages

PAGES = 64
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


@pytest.fixture
def mapped(tmp_path):
    """Random bytes mapped from a file, all read once."""
    file = tmp_path / "weights.safetensors"
    count = PAGES * mmap.PAGESIZE
    file.write_bytes(torch.randint(0, 256, (count,), dtype=torch.uint8).numpy().tobytes())
    tensor = torch.from_file(str(file), shared=False, size=count, dtype=torch.uint8)
    tensor.sum()
    return tensor


def resident_kib(tensor):
    """Resident memory of the mapping that a tensor lies in."""
    inside = False
    for line in open("/proc/self/smaps", encoding="utf-8"):  # noqa: SIM115
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= tensor.data_ptr() < high
        elif inside and first == "Rss:":
            return int(line.split()[1])
    raise AssertionError("not mapped")


def test_pages_of_a_mapped_tensor_go_and_their_bytes_stay(mapped):
    before = mapped.clone()
    assert resident_kib(mapped) >= PAGES * mmap.PAGESIZE // 1024
    assert pages.release(mapped) == PAGES * mmap.PAGESIZE
    assert resident_kib(mapped) == 0
    assert torch.equal(mapped, before)


def test_pages_that_others_share_stay(mapped):
    part = mapped[mmap.PAGESIZE // 2 : -mmap.PAGESIZE // 2]
    assert pages.release(part) == (PAGES - 2) * mmap.PAGESIZE
    assert resident_kib(mapped) == 2 * mmap.PAGESIZE // 1024
    assert pages.release(mapped[10:20]) == 0


def test_memory_that_is_no_file_is_left_alone():
    tensor = torch.randn(1 << 22)
    before = tensor.clone()
    assert pages.release(tensor) == 0
    assert torch.equal(tensor, before)


def test_without_the_list_of_mappings_nothing_is_given_back(mapped, tmp_path, monkeypatch):
    empty = tmp_path / "maps"
    empty.write_text("")
    monkeypatch.setattr(pages, "MAPS", empty)
    assert pages.release(mapped) == 0
