import importlib.util
from pathlib import Path

import pytest
import torch

from llmprune.baselines import taylor_scores
from llmprune.gates import attach_gates
from llmprune.integrated import integrated_slopes
from llmprune.matching import refit_weights
from llmprune.recipe import UNIT_KINDS
from llmprune.scoring import score_units, unit_means
from llmprune.statistics import collect_statistics
from llmprune.units import map_units

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

METHODS = (
    "random",
    "magnitude",
    "wanda",
    "flap",
    "taylor",
    "taylor_squared",
    "block_influence",
    "omp",
    "fisher",
    "integrated",
    "activation",
)


def rows():
    return [tiny.tokens(batch=2, length=10, seed=seed) for seed in range(3)]


def scores_of(method, model, kinds, seed=0):
    return score_units(method, model, map_units(model), torch.cat(rows()), kinds=kinds, seed=seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_method_scores_every_unit_and_leaves_the_model_alone(family, method):
    model = tiny.tiny_model(family)
    unit_map = map_units(model)
    before = tiny.logits(model)
    scores = scores_of(method, model, UNIT_KINDS)
    assert {name: len(score) for name, score in scores.items()} == {
        name: group.num_units for name, group in unit_map.groups.items()
    }
    assert all(torch.isfinite(score).all() and (score >= 0).all() for score in scores.values())
    assert torch.equal(tiny.logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_random_follows_its_seed():
    model = tiny.tiny_model("llama")
    one, again, two = (scores_of("random", model, ("heads",), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_magnitude_squared_counts_every_weight_of_a_unit_once(family):
    model = tiny.tiny_model(family)
    unit_map = map_units(model)
    kinds = ("mlp_channels", "kv_groups", "layers")
    scores = scores_of("magnitude", model, kinds)
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
    assert float(scores[name][unit]) == pytest.approx(abs(slope) / 6, rel=1e-2)


def test_wanda_of_a_channel_is_its_mean_square_times_its_weights():
    model = tiny.tiny_model("gpt2")
    scores = scores_of("wanda", model, ("mlp_channels",))
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
    kinds = ("layers", "attention_sublayers", "mlp_sublayers")
    scores = scores_of("activation", model, kinds)
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
    for place, value in whole.sums.items():
        assert torch.allclose(value, parts.sums[place])
        assert torch.allclose(whole.squares[place], parts.squares[place])
    for name, similarity in whole.similarity.items():
        assert similarity == pytest.approx(parts.similarity[name], rel=1e-5)


def test_fisher_is_the_divergence_that_a_slightly_closed_gate_causes():
    """Twice the score times half the step squared is the KL divergence, to second order."""
    model = tiny.tiny_model("llama").double()
    unit_map = map_units(model)
    means = unit_means(model, unit_map, torch.cat(rows()))
    tokens = tiny.tokens(batch=1, length=3)
    # the mean over many draws of the labels is the expectation that the divergence is
    many = tokens.repeat(4000, 1)
    kinds = ("kv_groups", "mlp_channels")
    score = taylor_scores(
        model, unit_map, many.split(1), kinds, order=2, labels="model", means=means
    )
    dense = tiny.logits(model, tokens)[:, :-1].log_softmax(-1)
    for name, unit, step in (("layers.1.mlp_channels", 7, 1e-2), ("layers.0.kv_groups", 1, 1e-2)):
        gates = attach_gates(model, unit_map, kinds, means)
        gate = torch.ones(unit_map.groups[name].num_units, dtype=torch.float64)
        gate[unit] -= step
        gates.set({name: gate})
        got = tiny.logits(model, tokens)[:, :-1].log_softmax(-1)
        gates.detach()
        divergence = float((dense.exp() * (dense - got)).sum())
        assert divergence == pytest.approx(float(score[name][unit]) * step**2, rel=0.1)


@pytest.mark.parametrize("with_means", [False, True])
def test_slopes_along_the_path_add_up_to_the_divergence_at_its_end(with_means):
    model = tiny.tiny_model("llama")
    unit_map = map_units(model)
    means = unit_means(model, unit_map, torch.cat(rows())) if with_means else None
    tokens = tiny.tokens(batch=1, length=10)
    kinds, reach, points = ("kv_groups", "mlp_channels"), 0.8, 32
    slopes = integrated_slopes(
        model,
        unit_map,
        [tokens] * points,
        kinds,
        means=means,
        reach=reach,
        num_points=points,
    )
    dense = tiny.logits(model, tokens).log_softmax(-1)
    gates = attach_gates(model, unit_map, kinds, means)
    gates.set({n: torch.full((unit_map.groups[n].num_units,), 1 - reach) for n in slopes})
    got = tiny.logits(model, tokens).log_softmax(-1)
    gates.detach()
    divergence = float((dense.exp() * (dense - got)).sum())
    total = -reach * sum(float(slope.sum()) for slope in slopes.values())
    assert total == pytest.approx(divergence, rel=0.01)


def test_integrated_scores_are_the_sizes_of_the_slopes():
    model = tiny.tiny_model("llama")
    kinds = ("kv_groups", "mlp_channels")
    slopes = integrated_slopes(model, map_units(model), torch.cat(rows()).split(1), kinds)
    scores = scores_of("integrated", model, kinds)
    for name, slope in slopes.items():
        assert torch.allclose(scores[name], slope.abs(), rtol=1e-5)


@pytest.mark.parametrize("reach", [0.0, 1.5])
def test_a_path_must_go_somewhere_and_end_at_zero(reach):
    model = tiny.tiny_model("llama")
    with pytest.raises(ValueError, match="reach must be in"):
        integrated_slopes(model, map_units(model), rows(), ("heads",), reach=reach)


def test_flap_divided_by_parameters_ranks_by_mean_standardised_fluctuation():
    model = tiny.tiny_model("llama")
    unit_map = map_units(model)
    statistics = collect_statistics(model, unit_map, rows())
    scores = scores_of("flap", model, ("kv_groups", "mlp_channels"))
    z = {}
    for layer in range(unit_map.num_layers):
        module = model.model.layers[layer]
        for branch, write, kind in (
            ("attention", module.self_attn.o_proj, "kv_groups"),
            ("mlp", module.mlp.down_proj, "mlp_channels"),
        ):
            variance = statistics.variances((layer, branch))
            value = variance * write.weight.detach().double().square().sum(0)
            value = (value - value.mean()) / value.std()
            units = unit_map.groups[f"layers.{layer}.{kind}"].num_units
            z[f"layers.{layer}.{kind}"] = value.reshape(units, -1).mean(1)
    sizes = {
        name: sum(
            dict(model.named_parameters())[s.parameter].numel()
            // dict(model.named_parameters())[s.parameter].shape[s.dim]
            * s.width
            for s in unit_map.groups[name].slices
        )
        for name in z
    }
    names = list(z)
    got = torch.cat([scores[name] / sizes[name] for name in names])
    assert torch.equal(
        got.argsort(stable=True), torch.cat([z[n] for n in names]).argsort(stable=True)
    )


def test_omp_scores_are_what_leaving_a_unit_out_adds_after_a_refit():
    model = tiny.tiny_model("llama")
    unit_map = map_units(model)
    statistics = collect_statistics(model, unit_map, rows(), with_grams=True)
    gram = statistics.grams[0, "mlp"].double()
    weights = model.model.layers[0].mlp.down_proj.weight.detach().double().T
    pulled = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))

    def error(kept):
        change = weights.clone()
        change[kept] -= refit_weights(gram, weights, torch.tensor(kept))
        return float((change * (pulled @ change)).sum()) / statistics.num_tokens

    scores = scores_of("omp", model, ("mlp_channels",))["layers.0.mlp_channels"]
    first = int(scores.argmin())
    alone = [error([u for u in range(len(gram)) if u != unit]) for unit in range(len(gram))]
    assert first == min(range(len(gram)), key=alone.__getitem__)
    assert float(scores[first]) == pytest.approx(alone[first], rel=1e-3)


def test_block_influence_of_a_sublayer_is_shared_out_among_its_units():
    model = tiny.tiny_model("llama")
    unit_map = map_units(model)
    scores = scores_of("block_influence", model, ("mlp_channels", "mlp_sublayers"))
    for layer in range(unit_map.num_layers):
        total = float(scores[f"layers.{layer}.mlp_channels"].sum())
        assert total == pytest.approx(float(scores["mlp_sublayers"][layer]))


def test_means_are_those_that_compensation_leaves_behind():
    model = tiny.tiny_model("gpt2")
    means = unit_means(model, map_units(model), torch.cat(rows()))
    seen = []
    write = model.transformer.h[1].attn.c_proj
    handle = write.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in rows():
        tiny.logits(model, batch)
    handle.remove()
    wanted = torch.cat([value.flatten(0, 1) for value in seen]).double().mean(0)
    assert torch.allclose(means.read[1, "attention"], wanted)


def test_gram_matrices_are_not_made_in_the_precision_of_the_forward_pass():
    model = tiny.tiny_model("llama").float()
    with torch.autocast("cpu", torch.bfloat16):
        found = collect_statistics(model, map_units(model), rows(), with_grams=True)
    for place, gram in found.grams.items():
        torch.testing.assert_close(
            gram.diagonal().double(), found.squares[place], rtol=1e-5, atol=0
        )


def test_squares_are_of_single_rows():
    model = tiny.tiny_model("llama")
    unit_map = map_units(model)
    with pytest.raises(ValueError, match="one row at a time, got 2"):
        taylor_scores(model, unit_map, rows(), ("heads",), order=2)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_fisher_draws_its_labels_and_squared_taylor_reads_them():
    model = tiny.tiny_model("llama")
    name = "layers.1.mlp_channels"
    fisher, other = (scores_of("fisher", model, ("mlp_channels",), seed)[name] for seed in (0, 1))
    squared, same = (
        scores_of("taylor_squared", model, ("mlp_channels",), seed)[name] for seed in (0, 1)
    )
    assert not torch.equal(fisher, other)
    assert torch.equal(squared, same)
