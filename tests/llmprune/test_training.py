from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmprune.baselines import activation_scores, collect_statistics
from llmprune.calibration import CalibrationSet
from llmprune.errors import InputError
from llmprune.gates import attach_gates
from llmprune.recipe import Recipe
from llmprune.selection import choose, find_targets, pools
from llmprune.surgery import cut
from llmprune.training import (
    Batches,
    GateRun,
    TrainedWeights,
    recover,
    start_accelerator,
    teacher_of,
    train_gates,
)
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
        self.targets = find_targets(self.unit_map, recipe.prune.rules(), None)
        kinds = tuple(recipe.prune.rules())
        priors = None
        if recipe.gates.prior == "activation":
            statistics = collect_statistics(model, self.unit_map, [rows.rows])
            priors = activation_scores(model, self.unit_map, statistics, kinds)
        frozen = copy.deepcopy(model) if recipe.gates.train == "all" else None
        self.weights = TrainedWeights(model, recipe.gates.train, recipe.gates.lora_rank, 0)
        self.gates = attach_gates(model, self.unit_map, kinds)
        self.teacher = teacher_of(frozen or model, self.gates, self.weights)
        self.losses = []

        def on_step(step, steps, loss):
            self.losses.append(loss)
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
@pytest.mark.parametrize("variant", ["capped", "paper"])
def test_the_optimizer_forgets_at_every_phase_boundary(variant, train_what, monkeypatch):
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


@pytest.mark.parametrize("variant", ["capped", "paper"])
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
    statistics = collect_statistics(model, trained.unit_map, [calibration().rows])
    priors = activation_scores(model, trained.unit_map, statistics, ("heads", "mlp_channels"))
    for name, prior in priors.items():
        if "mlp" in name:
            assert trained.scores.scores[name].argsort().tolist() == prior.argsort().tolist()


def test_equal_runs_give_equal_scores_and_a_loss_that_is_finite():
    for options in ({"variant": "paper"}, {"train": "lora"}, {"train": "all"}):
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


@pytest.mark.parametrize("train_what", ["gates", "lora", "all"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro, train_what):
    prune = {"mlp_channels": {"sparsity": 0.4}, "heads": {"sparsity": 0.5}}
    options = {"train": train_what, "learning_rate": 0.01}
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

    with pytest.raises(InputError, match="batch_size must be a multiple .* got 3 for 2 processes"):
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
        on_step=lambda step, steps, loss: losses.append(loss),
    )
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, _ in pruned.named_parameters()] == names
    assert torch.equal(logits(dense), before)
    assert all(parameter.requires_grad for parameter in pruned.parameters())


# stopping and going on


@pytest.mark.parametrize("train_what", ["gates", "lora", "all"])
@pytest.mark.parametrize("variant", ["capped", "paper"])
def test_a_resumed_run_gives_the_same_scores(variant, train_what, tmp_path):
    options = {"variant": variant, "train": train_what, "dense": 0.25, "sparsify": 0.5}
    options |= {"sparse": 0.25, "cycles": 2}
    recipe = recipe_for(HALF_OF_ALL, training={"save_every": 2}, **options)
    whole = Trained(tiny_model("llama").float(), recipe)
    # after 4 of 12 steps a phase begins, after 7 and 11 one is under way
    for stop in (1, 5, 7, 11):
        file = tmp_path / f"{stop}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            Trained(tiny_model("llama").float(), recipe, state_file=file, stop_after=stop)
        assert file.exists() == (stop > 1)
        again = Trained(tiny_model("llama").float(), recipe, state_file=file)
        assert len(again.losses) == 12 - stop // 2 * 2
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
