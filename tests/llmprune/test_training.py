from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from llmprune.accelerator import start_accelerator
from llmprune.batches import Batches
from llmprune.calibration import CalibrationSet
from llmprune.cost import measure_cost
from llmprune.errors import InputError
from llmprune.gates import attach_gates
from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe
from llmprune.recovery import recover
from llmprune.scores import UnitScores
from llmprune.scoring import score_units
from llmprune.selection import choose, pools
from llmprune.surgery import cut
from llmprune.targets import targets_of
from llmprune.trained_weights import TrainedWeights
from llmprune.training import GateRun, rate_for, teacher_of, train_gates
from llmprune.units import map_units
from tests.llmprune.tiny import FAMILIES, VOCAB, logits, plan_for, tiny_model

HALF_OF_ALL = {"mlp_channels": {"sparsity": 0.5}, "heads": {"sparsity": 0.5}}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def recipe_for(prune, *, training=None, recovery=None, export="per_layer", **gates):
    shares = {"dense": 0.0, "sparsify": 0.75, "sparse": 0.25}
    settings = {"steps": 12, "batch_size": 4, **shares, **gates}
    return Recipe.parse(
        {
            "model": {"source": "none"},
            "prune": prune,
            "gates": settings,
            "training": training or {},
            "recovery": recovery or {},
            "export": {"format": export},
        }
    )


def calibration(num_rows=16, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCAB, (num_rows, length), generator=generator)
    return CalibrationSet(rows, "random", "random", seed)


class Trained:
    """One gate training from start to end, as the pipeline does it."""

    def __init__(self, model, recipe, rows=None, *, state_file=None, identity="", stop_after=None):
        rows = rows or calibration()
        accelerator = start_accelerator(recipe.training, recipe.seed)
        self.unit_map = map_units(model)
        self.targets = targets_of(self.unit_map, recipe)
        kinds = tuple(recipe.prune.rules())
        priors = None
        if recipe.gates.prior != "none":
            priors = score_units(recipe.gates.prior, model, self.unit_map, rows.rows, kinds=kinds)
        frozen = copy.deepcopy(model) if recipe.gates.train == "all" else None
        self.weights = TrainedWeights(model, recipe.gates.train, recipe.gates.lora_rank, 0)
        self.gates = attach_gates(model, self.unit_map, kinds)
        self.teacher = teacher_of(frozen or model, self.gates, self.weights)
        self.losses, self.rates = [], []

        def on_step(step, steps, figures):
            self.losses.append(figures["loss"])
            self.rates.append(figures["logits_learning_rate"])
            if step == stop_after:
                raise KeyboardInterrupt

        run = GateRun(
            accelerator,
            self.weights,
            self.teacher,
            priors=priors,
            state_file=state_file,
            identity=identity,
            on_step=on_step,
        )
        self.pools = pools(self.unit_map, self.targets)
        self.scores = train_gates(model, self.gates, rows, self.pools, recipe=recipe, run=run)

    @property
    def plan(self):
        return choose(self.scores, self.unit_map, self.targets)

    def finish(self):
        self.gates.detach()
        self.weights.finish()


def train(model, prune=None, **options):
    training = options.pop("training", None)
    recipe = recipe_for(prune or HALF_OF_ALL, training=training, **options)
    return Trained(model.float(), recipe)


def equal_scores(one, other):
    tables = ("scores", "dropped_at", "scale")
    return all(
        getattr(one, t).keys() == getattr(other, t).keys()
        and all(torch.equal(getattr(one, t)[name], v) for name, v in getattr(other, t).items())
        for t in tables
    )


# the loop


@pytest.mark.parametrize("train_what", ["gates", "lora", "all"])
@pytest.mark.parametrize("variant", ["capped", "plus_plus"])
def test_the_optimizer_forgets_at_every_phase_boundary(variant, train_what, monkeypatch):
    """T12: its state is empty before the first step of every phase and at no other step."""
    sizes = {}
    step_once = Batches.train_step

    def spy(self, step, optimizer, *args, **options):
        sizes[step] = len(optimizer.state)
        return step_once(self, step, optimizer, *args, **options)

    monkeypatch.setattr(Batches, "train_step", spy)
    shares = {"dense": 0.25, "sparsify": 0.5, "sparse": 0.25, "cycles": 2, "steps": 16}
    train(tiny_model("llama", layers=2), variant=variant, train=train_what, **shares)
    boundaries = {0, 2, 6, 8, 10, 14}
    assert {step for step, size in sizes.items() if size == 0} == boundaries
    assert len(sizes) == 16


@pytest.mark.parametrize("variant", ["capped", "plus_plus"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_runs_for_every_family_and_gives_scores_for_every_unit(family, variant):
    kinds = ("heads", "mlp_channels", "hidden_channels", "layers", "mlp_sublayers")
    model = tiny_model(family, ratio=3)
    trained = train(model, {kind: {"sparsity": 0.4} for kind in kinds}, variant=variant)
    names = {g.name for kind in kinds for g in trained.unit_map.of_kind(kind)}
    assert trained.scores.scores.keys() == names
    assert all(torch.isfinite(value).all() for value in trained.scores.scores.values())
    assert len(trained.losses) == 12
    trained.plan.validate(trained.unit_map)
    trained.gates.detach()
    cut(model, trained.plan, form="per_layer")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gates_end_where_the_plan_is(family):
    model = tiny_model(family, ratio=3)
    trained = train(model)
    gated = logits(model)
    trained.gates.set_plan(trained.plan)
    assert torch.equal(logits(model), gated)


@pytest.mark.parametrize("variant", ["capped", "plus_plus"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_and_cut_the_model_is_what_its_trained_gates_made_it(family, variant):
    """T12: in float32 within 1e-5; test_surgery has it for any plan, and saved and loaded."""
    model = tiny_model(family, ratio=3)
    trained = train(model, variant=variant)
    plan = trained.plan
    assert bool(plan.scale) == (variant == "plus_plus")
    trained.gates.set_plan(plan)
    gated = logits(model)
    trained.finish()
    torch.testing.assert_close(
        logits(cut(model, plan, form="per_layer")), gated, atol=1e-5, rtol=1e-5
    )


def test_nothing_but_logits_changes_when_gates_alone_are_trained():
    model = tiny_model("qwen3").float()
    before = logits(model)
    trained = train(model, prior="none")
    trained.finish()
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(value.abs().max() > 0.1 for value in trained.scores.scores.values())


def test_no_steps_leave_the_priors_order():
    model = tiny_model("llama").float()
    trained = train(model, steps=0)
    kinds = ("heads", "mlp_channels")
    priors = score_units("fisher", model, trained.unit_map, calibration().rows, kinds=kinds)
    for name, prior in priors.items():
        if "mlp" in name:
            assert trained.scores.scores[name].argsort().tolist() == prior.argsort().tolist()


def test_equal_runs_give_equal_scores_and_a_loss_that_is_finite():
    for options in ({"variant": "plus_plus"}, {"train": "lora"}, {"train": "all"}):
        runs = [train(tiny_model("llama"), **options) for _ in range(2)]
        assert equal_scores(runs[0].scores, runs[1].scores)
        assert runs[0].losses == runs[1].losses


@pytest.mark.parametrize("loss", ["distillation", "next_token"])
def test_the_loss_is_the_mean_over_the_rows_of_the_step(loss):
    model = tiny_model("llama")
    rows = calibration().rows[:4]
    dense = model.float()(rows).logits
    trained = train(model, loss=loss, steps=1, dense=1.0, sparsify=0.0, sparse=0.0)
    expected = 0.0
    if loss == "next_token":
        expected = float(
            nn.functional.cross_entropy(dense[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        )
    assert trained.losses[0] == pytest.approx(expected, abs=1e-5)
    # one token each position from the dense to the gated model: the Kullback-Leibler divergence
    trained.finish()
    hard = train(model, loss=loss, steps=1, sparsify=1.0, sparse=0.0)
    with torch.no_grad():
        gated = model(rows).logits
    divergence = nn.functional.kl_div(
        gated.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum"
    )
    if loss == "distillation":
        assert hard.losses[0] == pytest.approx(float(divergence) / rows.numel(), rel=1e-4)
    assert hard.losses[0] > trained.losses[0]


@pytest.mark.parametrize(
    ("lost", "rate"), [(-0.1, 0.02), (0.4, 0.02), (0.6, 0.03), (0.8, 0.04), (1.0, 0.05), (9, 0.05)]
)
def test_the_more_the_start_loses_the_faster_logits_learn(lost, rate):
    assert rate_for(lost) == pytest.approx(rate)


@pytest.fixture
def wide_rates(monkeypatch):
    """Rates between the limits: what a tiny model loses is little."""
    monkeypatch.setattr("llmprune.training.AUTO_RATES", (0.0, 100.0))
    monkeypatch.setattr("llmprune.training.RATE_PER_NAT", 0.5)


@pytest.mark.parametrize("loss", ["distillation", "next_token"])
def test_the_rate_is_found_from_what_the_start_loses(loss, wide_rates):
    model = tiny_model("llama").float()
    rows = calibration().rows[:4]
    whole = 0.0
    if loss == "next_token":
        dense = model(rows).logits[:, :-1].detach()
        whole = float(nn.functional.cross_entropy(dense.flatten(0, 1), rows[:, 1:].flatten()))
    trained = train(model, loss=loss, learning_rate="auto")
    # gates are there from the first step on, when nothing has been learned yet
    assert trained.rates[0] == pytest.approx(0.5 * (trained.losses[0] - whole), rel=1e-4)
    assert trained.losses[0] > whole
    assert set(trained.rates) == {trained.rates[0]}
    trained.finish()
    # and it is the rate that a recipe could have named
    named = train(tiny_model("llama"), loss=loss, learning_rate=trained.rates[0])
    assert equal_scores(named.scores, trained.scores)
    other = train(tiny_model("llama"), loss=loss, learning_rate=2 * trained.rates[0])
    assert not equal_scores(other.scores, trained.scores)


def test_a_resumed_run_keeps_the_rate_that_was_found(tmp_path, wide_rates):
    recipe = recipe_for(HALF_OF_ALL, training={"save_every": 5}, learning_rate="auto")
    whole = Trained(tiny_model("llama").float(), recipe)
    file = tmp_path / "gates.safetensors"
    model = tiny_model("llama").float()
    with pytest.raises(KeyboardInterrupt):
        Trained(model, recipe, state_file=file, stop_after=7)
    resumed = Trained(tiny_model("llama").float(), recipe, state_file=file)
    assert resumed.rates == whole.rates[5:]
    assert resumed.rates[0] > 0
    assert equal_scores(resumed.scores, whole.scores)


@pytest.mark.parametrize("train_what", ["gates", "lora", "all"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro, train_what):
    prune = {"mlp_channels": {"sparsity": 0.4}, "heads": {"sparsity": 0.5}}
    # from equal-sized logits: near a gradient of zero Adam makes steps of rounding errors
    options = {"train": train_what, "learning_rate": 0.01, "prior": "activation"}
    whole = train(tiny_model("llama"), prune, **options)
    parts = train(tiny_model("llama"), prune, micro_batch_size=micro, **options)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4, abs=1e-6)
    for name, value in whole.scores.scores.items():
        torch.testing.assert_close(parts.scores.scores[name], value, atol=1e-5, rtol=0)
    assert parts.plan == whole.plan


def calls_of(module, count):
    return module.register_forward_hook(lambda *_: count.append(1))


@pytest.mark.parametrize("train_what", ["gates", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activation_checkpointing_gives_the_same_run(family, train_what):
    plain_model, model = (tiny_model(family, ratio=3) for _ in range(2))
    if family == "gpt2":
        for one in (plain_model, model):
            for module in one.modules():
                if isinstance(module, nn.Dropout):
                    # dropout that woke up would be seen
                    module.p = 0.5
    calls = {"plain": [], "again": []}
    layer = "transformer.h.0" if family == "gpt2" else "model.layers.0"
    norm = "ln_1" if family == "gpt2" else "input_layernorm"
    for one, name in ((plain_model, "plain"), (model, "again")):
        calls_of(one.get_submodule(f"{layer}.{norm}"), calls[name])
    plain = train(plain_model, train=train_what, prior="none")
    checkpointed = train(
        model, train=train_what, prior="none", training={"activation_checkpointing": True}
    )
    checkpointed.finish()
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-5)
    assert checkpointed.plan == plain.plan
    # student and teacher once, and the student again in the backward pass
    assert len(calls["plain"]) == 12 * 2
    assert len(calls["again"]) == 12 * 3
    assert not any(module.training for module in model.modules())
    assert not model.is_gradient_checkpointing


def test_a_batch_is_a_multiple_of_the_processes():
    recipe = recipe_for(HALF_OF_ALL, batch_size=3)

    class Two:
        num_processes, process_index = 2, 0

    with pytest.raises(InputError, match=r"batch_size must .* got 3 for 2 processes"):
        Batches(Two(), calibration(), recipe.gates, recipe.training)


# weights that learn along


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("train_what", ["lora", "all"])
def test_weights_that_learn_along_change_and_the_model_stays_plain(family, train_what):
    model = tiny_model(family).float()
    names = [name for name, _ in model.named_parameters()]
    types = [type(module) for module in model.modules()]
    dense, before = logits(model), copy.deepcopy(model.state_dict())
    trained = train(model, train=train_what, weights_learning_rate=1e-2)
    with trained.gates.opened():
        learned = logits(model)
    trained.finish()
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(module) for module in model.modules()] == types
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert float((learned - dense).abs().max()) > 1e-2
    # the merged model is what the adapted one was
    torch.testing.assert_close(logits(model), learned, atol=2e-4, rtol=0)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    write = (
        "transformer.h.1.mlp.c_proj.weight"
        if family == "gpt2"
        else ("model.layers.1.mlp.down_proj.weight")
    )
    assert write in changed
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    assert (embedding in changed) == (train_what == "all")
    map_units(model)


@pytest.mark.parametrize("train_what", ["gates", "lora", "all"])
def test_the_teacher_is_the_dense_model_to_the_end(train_what):
    model = tiny_model("llama").float()
    rows = calibration().rows[:3]
    with torch.no_grad():
        dense = model(rows).logits
    trained = train(model, train=train_what, weights_learning_rate=1e-2)
    with torch.no_grad():
        assert torch.equal(trained.teacher(rows), dense)
        assert not torch.allclose(model(rows).logits, dense, atol=1e-2)


@pytest.mark.parametrize("train_what", ["lora", "all"])
def test_distillation_begins_at_no_loss_with_open_gates(train_what):
    shares = {"dense": 1.0, "sparsify": 0.0, "sparse": 0.0, "steps": 1}
    assert train(tiny_model("llama"), train=train_what, **shares).losses == pytest.approx(
        [0.0], abs=1e-6
    )


# recovery


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("loss", ["distillation", "next_token"])
@pytest.mark.parametrize("train_what", ["lora", "all"])
def test_recovery_lowers_the_loss_and_leaves_a_plain_model(family, train_what, loss):
    dense = tiny_model(family).float()
    before = logits(dense)
    pruned = cut(dense, plan_for(dense, ("heads", "mlp_channels")), form="per_layer")
    names = [name for name, _ in pruned.named_parameters()]
    recovery = {"train": train_what, "loss": loss, "steps": 30, "batch_size": 4}
    recipe = recipe_for(HALF_OF_ALL, recovery={**recovery, "learning_rate": 3e-3})
    losses = []
    recover(
        pruned,
        calibration(num_rows=4),
        recipe=recipe,
        accelerator=start_accelerator(recipe.training, 0),
        teacher=dense,
        on_step=lambda step, steps, figures: losses.append(figures["loss"]),
    )
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, _ in pruned.named_parameters()] == names
    assert torch.equal(logits(dense), before)
    assert all(parameter.requires_grad for parameter in pruned.parameters())


# what is planted is found


def default_recipe(prune, **gates):
    data = {"model": {"source": "none"}, "prune": prune, "gates": {"batch_size": 4, **gates}}
    return Recipe.parse({**data, "export": {"format": "per_layer"}})


def silence(model, group, units):
    """Zero what the units of a group write."""
    architecture = map_units(model).architecture
    branches = (architecture.attention, architecture.mlp)
    writes = tuple(f"{branch.write}.{kind}" for branch in branches for kind in ("weight", "bias"))
    with torch.no_grad():
        for own in group.slices:
            embeds = own.parameter.startswith(architecture.embeddings)
            if own.parameter.endswith(writes) or (embeds and group.kind == "hidden_channels"):
                for unit in units:
                    start = own.offset + unit * own.width
                    model.get_parameter(own.parameter).narrow(own.dim, start, own.width).zero_()
        for unit in units if group.whole else ():
            for name in group.whole[unit]:
                if name.endswith(writes):
                    model.get_parameter(name).zero_()


@pytest.mark.parametrize("prior", ["fisher", "integrated", "activation", "none"])
@pytest.mark.parametrize(
    ("kind", "dead", "sparsity"),
    [
        ("mlp_channels", (1, 5, 17, 18, 39), 0.25),
        ("heads", (2, 3), 1 / 3),
        ("layers", (1,), 1 / 3),
        ("attention_sublayers", (2,), 1 / 3),
        ("mlp_sublayers", (0,), 1 / 3),
        ("hidden_channels", (0, 7, 8, 31, 47), 0.25),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_units_that_write_nothing_are_the_first_to_go(family, kind, dead, sparsity, prior):
    """T13."""
    model = tiny_model(family, ratio=3).float()
    for group in map_units(model).of_kind(kind):
        silence(model, group, dead)
    trained = Trained(model, default_recipe({kind: {"sparsity": sparsity}}, prior=prior))
    for group in trained.unit_map.of_kind(kind):
        assert not set(dead) & set(trained.plan.kept[group.name])
        scores = trained.scores.scores[group.name]
        alive = [unit for unit in range(group.num_units) if unit not in dead]
        if prior == "none":
            continue
        if kind == "heads" and family == "llama":
            # heads compete inside their KV group: 2 in the first, 3 in the second
            assert scores[2] < scores[:2].min()
            assert scores[3] < scores[4:].min()
        else:
            assert scores[list(dead)].max() < scores[alive].min()


def nearly_twin_heads(seed):
    """Six heads in one layer; 0 and 1 are one head split 55 to 45, the others worth 0.7 of it."""
    model = tiny_model("llama", ratio=1, kv_groups=6, layers=1, seed=seed).float()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[8:16] = projection.weight[:8]
        write = attention.o_proj.weight
        # small, so that what is lost by removing a set of heads is near to quadratic
        write *= 0.15
        write[:, 8:16] = 0.45 * write[:, :8]
        write[:, :8] *= 0.55
        write[:, 16:] *= 0.7
    return model


def loss_without(model, heads, rows):
    gates = attach_gates(model, map_units(model), ("heads",))
    with torch.no_grad():
        dense = model(rows).logits.log_softmax(-1)
        gates.set({"layers.0.heads": torch.tensor([float(h not in heads) for h in range(6)])})
        gated = model(rows).logits.log_softmax(-1)
    gates.detach()
    return float((dense.exp() * (dense - gated)).sum(-1).mean())


@pytest.mark.parametrize("seed", range(4))
def test_of_two_heads_that_do_the_same_exactly_one_goes(seed):
    """T13: either alone is the cheapest to lose, both the dearest; one-shot scores lose both."""
    model, rows = nearly_twin_heads(seed), calibration(num_rows=32)
    recipe = default_recipe({"heads": {"sparsity": 1 / 3}})
    scores = score_units("wanda", model, map_units(model), rows.rows, kinds=("heads",))
    once = scores["layers.0.heads"]
    assert set(once.argsort()[:2].tolist()) == {0, 1}
    trained = Trained(model, recipe, rows)
    trained.finish()
    gone = set(range(6)) - set(trained.plan.kept["layers.0.heads"])
    assert len(gone & {0, 1}) == 1
    assert loss_without(model, gone, rows.rows) < loss_without(model, {0, 1}, rows.rows)


# stopping and going on


@pytest.mark.parametrize("train_what", ["gates", "lora", "all"])
@pytest.mark.parametrize("variant", ["capped", "plus_plus"])
def test_a_resumed_run_gives_the_same_scores(variant, train_what, tmp_path):
    """T11, T12."""
    options = {"variant": variant, "train": train_what, "dense": 0.25, "sparsify": 0.5}
    options |= {"sparse": 0.25, "cycles": 2}
    recipe = recipe_for(HALF_OF_ALL, training={"save_every": 3}, **options)
    whole = Trained(tiny_model("llama").float(), recipe)
    # phases begin after 2, 4, 6, 8 and 10 steps; states are of 3, 6 and 9: one new, two under way
    for stop in (1, 5, 6, 11):
        file = tmp_path / f"{stop}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            Trained(tiny_model("llama").float(), recipe, state_file=file, stop_after=stop)
        assert file.exists() == (stop > 2)
        again = Trained(tiny_model("llama").float(), recipe, state_file=file)
        assert len(again.losses) == 12 - stop // 3 * 3
        assert again.losses == whole.losses[-len(again.losses) :]
        assert equal_scores(again.scores, whole.scores)


def test_a_state_of_another_run_is_refused(tmp_path):
    recipe = recipe_for(HALF_OF_ALL, training={"save_every": 2})
    file = tmp_path / "gates.safetensors"
    model = tiny_model("llama").float()
    with pytest.raises(KeyboardInterrupt):
        Trained(model, recipe, state_file=file, identity="one", stop_after=4)
    with pytest.raises(InputError, match=r"gates\.safetensors: must come from this recipe"):
        Trained(tiny_model("llama").float(), recipe, state_file=file, identity="other")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"", lambda data: b"x" * 99]
)
def test_a_damaged_state_is_refused(damage, tmp_path):
    recipe = recipe_for(HALF_OF_ALL, training={"save_every": 2})
    file = tmp_path / "gates.safetensors"
    with pytest.raises(KeyboardInterrupt):
        Trained(tiny_model("llama").float(), recipe, state_file=file, stop_after=4)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"gates\.safetensors: is damaged .*; delete it"):
        Trained(tiny_model("llama").float(), recipe, state_file=file)


# several processes

WORKER = """
import atexit
import os
import sys
from pathlib import Path

import torch

from tests.llmprune.test_training import HALF_OF_ALL, Trained, recipe_for
from tests.llmprune.tiny import tiny_model

variant, train, folder = sys.argv[1:]
rank = os.environ.get("RANK", "alone")
# what is registered first runs last
atexit.register(
    lambda: (Path(folder) / f"{rank}-grouped").write_text(str(torch.distributed.is_initialized()))
)
options = {"variant": variant, "train": train, "dense": 0.25, "sparsify": 0.5}
recipe = recipe_for(HALF_OF_ALL, **options)
trained = Trained(tiny_model("llama").float(), recipe)
(Path(folder) / rank).write_text(trained.plan.to_json())
"""


@pytest.mark.slow
@pytest.mark.parametrize("train_what", ["gates", "all"])
@pytest.mark.parametrize("variant", ["capped", "plus_plus"])
def test_two_processes_find_the_plan_that_one_finds(variant, train_what, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "eval")]),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(script), variant, train_what, str(tmp_path)]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    two += ["--standalone"]
    for command in (two, [sys.executable]):
        subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)
    alone, first, second = (tmp_path / name for name in ("alone", "0", "1"))
    assert first.read_bytes() == second.read_bytes()
    # a process that ends inside its group can be aborted by the group's threads
    assert {(tmp_path / f"{rank}-grouped").read_text() for rank in "01"} == {"False"}
    if variant == "capped":
        assert first.read_bytes() == alone.read_bytes()
    else:
        # the plan holds the gates, and sums over processes round their last digits
        plan, other = PrunePlan.read(alone), PrunePlan.read(first)
        assert other.kept == plan.kept
        for name, scale in plan.scale.items():
            assert other.scale[name] == pytest.approx(scale, rel=1e-3)


def test_where_importance_decides_units_of_all_layers_share_a_budget():
    model = tiny_model("llama", layers=2).float()
    recipe = Recipe.parse(
        {
            "model": {"source": "none"},
            "prune": {"heads": {}, "mlp_channels": {}},
            "budget": {"sparsity": 0.3, "allocation": "importance", "tolerance": 0.05},
            "gates": {"steps": 6, "batch_size": 2},
            "export": {"format": "per_layer"},
        }
    )
    trained = Trained(model, recipe)
    assert [pool.costs is None for pool in trained.pools] == [False]
    assert all(float(values.min()) >= 0 for values in trained.scores.scores.values())
    plan = trained.plan
    plan.validate(trained.unit_map)
    dense = measure_cost(trained.unit_map).decoder_parameters
    reached = measure_cost(trained.unit_map, plan.widths(trained.unit_map)).decoder_parameters
    assert 0.65 * dense <= reached <= 0.7 * dense
    trained.finish()


# several seeds


def trained_on(index, **gates):
    """What one of two seeds learns alone."""
    # a prior that does not mind the order of the rows
    gates = {"prior": "activation", "steps": 6, **gates}
    recipe = default_recipe({"mlp_channels": {"sparsity": 0.4}}, **gates)
    return Trained(tiny_model("llama").float(), recipe, calibration().reordered(index))


def test_the_logits_of_two_seeds_are_averaged_and_their_agreement_is_kept():
    both = trained_on(0, seeds=2)
    one, two = trained_on(0), trained_on(1)
    for name, score in both.scores.scores.items():
        mean = (one.scores.scores[name] + two.scores.scores[name]) / 2
        torch.testing.assert_close(score, mean)
    assert not equal_scores(one.scores, two.scores)
    assert set(both.scores.agreement) == {"rank_correlation", "chance"}
    assert one.scores.agreement == {}
    again = UnitScores.from_json(both.scores.to_json())
    assert again.agreement == both.scores.agreement


def test_seeds_that_agree_no_more_than_chance_are_warned_of(monkeypatch):
    monkeypatch.setattr("llmprune.training.rank_correlation", lambda first, second: -0.01)
    with pytest.warns(UserWarning, match="no more than chance"):
        trained_on(0, seeds=2)


@pytest.mark.parametrize("stop", [3, 9])
def test_a_killed_run_of_two_seeds_goes_on_where_it_was(tmp_path, stop):
    recipe = default_recipe({"mlp_channels": {"sparsity": 0.4}}, steps=6, seeds=2)
    often = recipe.training.model_copy(update={"save_every": 1})
    recipe = recipe.model_copy(update={"training": often})
    whole = Trained(tiny_model("llama").float(), recipe)
    file = tmp_path / "gates.safetensors"
    calls = {"left": stop}
    once = Batches.train_step

    def stopping(self, *args, **options):
        if calls["left"] == 0:
            raise KeyboardInterrupt
        calls["left"] -= 1
        return once(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            Trained(tiny_model("llama").float(), recipe, state_file=file)
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Batches, "train_step", lambda self, *a, **o: done.append(1) or once(self, *a, **o)
        )
        resumed = Trained(tiny_model("llama").float(), recipe, state_file=file)
    assert equal_scores(resumed.scores, whole.scores)
    assert len(done) == 12 - stop


def test_rows_in_another_order_are_the_same_rows():
    rows = calibration()
    other = rows.reordered(3)
    assert torch.equal(rows.reordered(0).rows, rows.rows)
    assert torch.equal(other.rows, rows.reordered(3).rows)
    assert not torch.equal(other.rows, rows.rows)
    assert sorted(other.rows.tolist()) == sorted(rows.rows.tolist())
