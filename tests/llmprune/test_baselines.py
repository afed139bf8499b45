import importlib.util
from pathlib import Path

import pytest
import torch

from llmprune.baselines import baseline_scores, collect_statistics, taylor_scores
from llmprune.gates import attach_gates
from llmprune.recipe import UNIT_KINDS
from llmprune.units import map_units

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

METHODS = ("random", "magnitude", "activation", "taylor")


def rows():
    return [tiny.tokens(batch=2, length=10, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_method_scores_every_unit_and_leaves_the_model_alone(family, method):
    model = tiny.tiny_model(family)
    unit_map = map_units(model)
    before = tiny.logits(model)
    scores = baseline_scores(method, model, unit_map, rows(), kinds=UNIT_KINDS, seed=0)
    assert {name: len(score) for name, score in scores.items()} == {
        name: group.num_units for name, group in unit_map.groups.items()
    }
    assert all(torch.isfinite(score).all() and (score >= 0).all() for score in scores.values())
    assert torch.equal(tiny.logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_random_follows_its_seed():
    model = tiny.tiny_model("llama")
    unit_map = map_units(model)
    one, again, two = (
        baseline_scores("random", model, unit_map, [], kinds=("heads",), seed=seed)
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_magnitude_squared_counts_every_weight_of_a_unit_once(family):
    model = tiny.tiny_model(family)
    unit_map = map_units(model)
    kinds = ("mlp_channels", "kv_groups", "layers")
    scores = baseline_scores("magnitude", model, unit_map, [], kinds=kinds, seed=0)
    for name, score in scores.items():
        group = unit_map.groups[name]
        zeroed = tiny.tiny_model(family)
        with torch.no_grad():
            weights = dict(zeroed.named_parameters())
            for parameter in group.whole[1] if group.whole else ():
                weights[parameter].zero_()
            for piece in group.slices:
                start = piece.offset + piece.width
                weights[piece.parameter].narrow(piece.dim, start, piece.width).zero_()
        lost = sum(
            float(p.detach().square().sum() - q.detach().square().sum())
            for p, q in zip(model.parameters(), zeroed.parameters(), strict=True)
        )
        assert float(score[1]) ** 2 == pytest.approx(lost, rel=1e-9)


def test_taylor_is_the_finite_difference_of_the_loss():
    model = tiny.tiny_model("llama")
    unit_map = map_units(model)
    scores = taylor_scores(model, unit_map, rows(), ("mlp_channels",))
    # the norms compute in float32, so the step must not be small
    name, unit, step = "layers.1.mlp_channels", 7, 1e-2
    gates = attach_gates(model, unit_map, ("mlp_channels",))

    def loss(value):
        gate = torch.ones(unit_map.groups[name].num_units, dtype=torch.float64)
        gate[unit] = value
        gates.set({name: gate})
        total = 0.0
        for batch in rows():
            logits = tiny.logits(model, batch)[:, :-1].flatten(0, 1)
            labels = batch[:, 1:].reshape(-1)
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return total

    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    assert float(scores[name][unit]) == pytest.approx(abs(slope), rel=1e-2)


def test_activation_of_a_channel_is_its_mean_square_times_its_weights():
    model = tiny.tiny_model("gpt2")
    unit_map = map_units(model)
    scores = baseline_scores("activation", model, unit_map, rows(), kinds=("mlp_channels",), seed=0)
    seen = []
    write = model.transformer.h[0].mlp.c_proj
    handle = write.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in rows():
        tiny.logits(model, batch)
    handle.remove()
    mean_square = torch.cat(seen).flatten(0, 1).square().mean(0)
    wanted = mean_square * write.weight.detach().square().sum(1)
    assert torch.allclose(scores["layers.0.mlp_channels"], wanted)


def test_a_layer_that_does_nothing_scores_nothing():
    model = tiny.tiny_model("llama")
    with torch.no_grad():
        for write in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            write.weight.zero_()
    unit_map = map_units(model)
    kinds = ("layers", "attention_sublayers", "mlp_sublayers")
    scores = baseline_scores("activation", model, unit_map, rows(), kinds=kinds, seed=0)
    for kind in kinds:
        assert float(scores[kind][1]) == pytest.approx(0, abs=1e-6)
        assert scores[kind][0] > 1e-3
        assert scores[kind][2] > 1e-3


def test_statistics_do_not_depend_on_how_rows_are_batched():
    model = tiny.tiny_model("qwen2")
    unit_map = map_units(model)
    whole = collect_statistics(model, unit_map, [torch.cat(rows())])
    parts = collect_statistics(model, unit_map, rows())
    assert whole.num_tokens == parts.num_tokens
    for name, value in whole.read.items():
        assert torch.allclose(value, parts.read[name])
    for name, similarity in whole.similarity.items():
        assert similarity == pytest.approx(parts.similarity[name], rel=1e-5)
