import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune_kernels.bsr import (
    COLUMN_PADDING,
    BlockIndex,
    check_block,
    gather_blocks,
    scatter_blocks,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def masks(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    flags = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flags).view(rows, columns)


@quick
@given(masks())
def test_an_index_is_its_mask(mask):
    index = BlockIndex.from_mask(mask)
    assert torch.equal(index.to_mask(), mask)
    assert index.num_blocks == int(mask.sum())
    assert index.max_per_row == int(mask.sum(1).max())
    assert index.max_per_column == int(mask.sum(0).max())
    assert all(tensor.dtype == torch.int32 for tensor in index.tensors().values())
    assert len(index.col) == len(index.t_row) == len(index.t_idx) == len(index.row) + COLUMN_PADDING


@quick
@given(masks())
def test_the_transposed_order_names_the_same_blocks_column_by_column(mask):
    index = BlockIndex.from_mask(mask)
    for column in range(mask.shape[1]):
        first, last = int(index.t_ptr[column]), int(index.t_ptr[column + 1])
        places = index.t_idx[first:last].long()
        assert index.t_row[first:last].tolist() == mask[:, column].nonzero().flatten().tolist()
        assert torch.equal(index.row[places], index.t_row[first:last])
        assert (index.col[places] == column).all()


@quick
@given(masks())
def test_saved_and_read_back_it_is_the_same(mask):
    index = BlockIndex.from_mask(mask)
    again = BlockIndex.from_saved(index.to_saved())
    for name, tensor in index.tensors().items():
        assert torch.equal(getattr(again, name), tensor), name
    assert again.max_per_row == index.max_per_row


@quick
@given(masks())
def test_scattered_blocks_are_the_masked_weight(mask):
    index, block = BlockIndex.from_mask(mask), (16, 32)
    weight = torch.randn(mask.shape[0] * 16, mask.shape[1] * 32, dtype=torch.float64)
    values = gather_blocks(weight, index, block)
    wanted = weight * mask.repeat_interleave(16, 0).repeat_interleave(32, 1)
    assert torch.equal(scatter_blocks(values, index), wanted)
    for place in range(index.num_blocks):
        row, column = int(index.row[place]), int(index.col[place])
        own = weight[row * 16 : row * 16 + 16, column * 32 : column * 32 + 32]
        assert torch.equal(values[place], own)


def test_rows_are_balanced_when_they_have_equally_many():
    assert BlockIndex.from_mask(torch.eye(3, dtype=torch.bool)).is_balanced
    assert not BlockIndex.from_mask(torch.ones(2, 2).tril().bool()).is_balanced


def broken(**changes):
    saved = BlockIndex.from_mask(torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)).to_saved()
    return {**saved, **{name: torch.tensor(value) for name, value in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"row_ptr": [0, 2]}, "row_ptr must have 3 entries"),
        ({"row_ptr": [0, 4, 3]}, "row_ptr must rise"),
        ({"row_ptr": [1, 2, 3]}, "row_ptr must rise"),
        ({"col": [0, 3, 1]}, r"columns must be in \[0, 3\)"),
        ({"col": [2, 0, 1]}, "columns must ascend"),
        ({"col": [0, 0, 1]}, "columns must ascend"),
        ({"shape": [0, 3]}, "shape must be positive"),
    ],
)
def test_a_broken_index_is_refused_with_the_rule(changes, rule):
    with pytest.raises(ValueError, match=f"^here: {rule}"):
        BlockIndex.from_saved(broken(**changes), name="here")


def test_a_missing_part_is_named():
    saved = broken()
    del saved["col"]
    with pytest.raises(ValueError, match="col is missing"):
        BlockIndex.from_saved(saved)


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(0, 3).bool(), torch.ones(4).bool()])
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match="keep_mask must be a bool matrix"):
        BlockIndex.from_mask(mask)


@pytest.mark.parametrize(
    ("block", "rule"), [((8, 16), "sides must be two of"), ((32, 16), "must divide the weight")]
)
def test_a_block_that_does_not_fit_is_refused(block, rule):
    with pytest.raises(ValueError, match=rule):
        check_block(block, 48, 64)
