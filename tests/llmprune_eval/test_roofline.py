import pytest
import torch

from llmprune.block_sparse import make_block_sparse
from llmprune_eval import roofline
from llmprune_eval.roofline import Rates, Work, decode_work, measure_rates, prefill_work, shape_of
from llmprune_kernels import BlockIndex


def test_flops_of_a_prefill_are_those_that_torch_counts(make_llama):
    from torch.utils.flop_counter import FlopCounterMode

    model = make_llama().eval()
    model.set_attn_implementation("eager")
    work = prefill_work(shape_of(model), 2, 12)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 12, dtype=torch.int64), use_cache=False, logits_to_keep=1)
    # torch multiplies whole squares of scores, of which a causal model needs 78 of 144
    square = 2 * 4 * 64 * 12 * 12
    # and the rotary tables: an outer product of half a head's size and the positions
    rotary = 2 * 4 * 12
    assert work.flops - square * 78 / 144 + square == pytest.approx(
        counter.get_total_flops(), abs=2 * rotary
    )


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_step_are_weights_but_embeddings_and_the_cache(make_llama, tied):
    model = make_llama(tie_word_embeddings=tied)
    embeddings = 99 * 32 * 4
    total = sum(p.numel() for p in model.parameters()) * 4
    shape = shape_of(model)
    # the tied matrix is read as the head
    assert shape.weight_bytes == (total if tied else total - embeddings)
    with torch.no_grad():
        cache = model(torch.zeros(3, 10, dtype=torch.int64), use_cache=True).past_key_values
    stored = sum(2 * layer.keys.nbytes for layer in cache.layers)
    assert decode_work(shape, 3, 9, 1).bytes == shape.weight_bytes + stored


def test_positions_of_gpt2_are_no_weights_that_are_read(make_gpt2):
    model = make_gpt2()
    shape = shape_of(model)
    per_layer = 32 * 96 + 32 * 32 + 2 * 32 * 128
    assert shape.matrix_elements == 2 * per_layer
    assert shape.query_size == 64


def test_of_block_sparse_layers_only_stored_blocks_count(make_llama):
    model = make_llama()
    name = "model.layers.0.mlp.up_proj"
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    blocks = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    model.get_submodule(name).weight.data.mul_(blocks)
    before = shape_of(model)
    make_block_sparse(model, {name: BlockIndex.from_mask(mask)}, {name: (16, 16)})
    after = shape_of(model)
    assert before.matrix_elements - after.matrix_elements == 4 * 16 * 16
    assert before.weight_bytes - after.weight_bytes == 4 * 16 * 16 * 4


def test_the_slower_of_arithmetic_and_memory_decides():
    rates = Rates(flops_per_s=1e9, bytes_per_s=1e8, buffer_bytes=1)
    assert rates.least_ms(Work(flops=2e9, bytes=1e8)) == 2000
    assert rates.least_ms(Work(flops=1e9, bytes=3e8)) == 3000


def test_more_context_and_rows_are_more_work(make_llama):
    shape = shape_of(make_llama())
    assert decode_work(shape, 1, 100, 4).bytes > decode_work(shape, 1, 10, 4).bytes
    assert decode_work(shape, 4, 10, 4).flops == 4 * decode_work(shape, 1, 10, 4).flops
    assert prefill_work(shape, 2, 10).flops == 2 * prefill_work(shape, 1, 10).flops


def test_rates_take_the_fastest_call(make_llama, monkeypatch):
    monkeypatch.setattr(roofline, "REPEATS", 2)
    # two reads of the clock a call: 4, 1; then 3, 2 of the other way
    clock = iter([0.0, 4.0, 4.0, 5.0, 5.0, 8.0, 8.0, 10.0])
    monkeypatch.setattr(roofline, "_now", lambda device: next(clock))
    assert roofline._least_seconds(torch.device("cpu"), [lambda: None, lambda: None]) == 1.0


def test_rates_of_a_small_model_come_from_a_small_buffer(make_llama):
    model = make_llama().to(torch.bfloat16)
    rates = measure_rates(model, shape_of(model))
    assert rates.buffer_bytes == 2**20
    assert rates.flops_per_s > 1e8
    assert rates.bytes_per_s > 1e8
