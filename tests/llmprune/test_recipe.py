import pytest

from llmprune.errors import InputError
from llmprune.recipe import Recipe

OPEN = "model: {source: a/b}\nprune: {mlp_channels: {}}\n"
SMALL = "model: {source: a/b}\nprune: {mlp_channels: {sparsity: 0.5}}\n"


def read(tmp_path, text, overrides=None):
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    return Recipe.read(file, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "gate: {}\n", "unknown key gate"),
        (SMALL + "gates: {step: 3}\n", "unknown key gates.step"),
        ("model: {source: a/b}\nprune: {mlp_channels: {sparsity: 1.0}}\n", "sparsity.*got 1.0"),
        ("model: {source: a/b}\nprune: {}\n", "at least one kind"),
        ("model: {source: a/b}\nprune: {heads: {}}\n", "no sparsity and there is no budget"),
        (SMALL + "budget: {sparsity: 0.2}\n", "no kind to act on"),
        (SMALL + "gates: {dense: 0.5}\n", "must be 1, got 1.5"),
        (SMALL + "gates: {temperature: [3, 1]}\n", "temperature"),
        (SMALL + "gates: {variant: plus_plus, prior: none}\n", "dense phase"),
        (
            "model: {source: a/b}\nprune: {mlp_channels: {sparsity: 0.5, scope: model}}\n",
            "per_layer",
        ),
        ("- a list\n", "mapping"),
        ("", "mapping"),
        ("a: [\n", "must be YAML"),
        (SMALL + "seed: -1\n", "seed"),
        (OPEN + "budget: {}\n", "exactly one of sparsity, latency_ms, latency, got none"),
        (OPEN + "budget: {sparsity: 0.2, latency: 0.8}\n", "got sparsity and latency"),
        (OPEN + "budget: {latency: 1.2}\n", "budget.latency"),
        (OPEN + "budget: {latency_ms: 0}\n", "budget.latency_ms"),
        (OPEN + "budget: {latency: 0.8, phase: both}\n", "budget.phase"),
        (
            "model: {source: a/b}\nprune: {hidden_channels: {}}\nbudget: {latency: 0.8}\n",
            "measured at the dense hidden size, got prune.hidden_channels",
        ),
        (
            OPEN + "budget: {sparsity: 0.2, allocation: importance}\ngates: {prior: none}\n",
            "needs gates.prior, got none",
        ),
        (
            "model: {source: a/b}\nexport: {format: per_layer}\nprune: {mlp_channels: {}, "
            "heads: {sparsity: 0.5, scope: model}}\n"
            "budget: {sparsity: 0.2, allocation: importance}\n",
            "prune.heads must have no sparsity of its own",
        ),
    ],
)
def test_a_wrong_recipe_names_the_file_the_key_and_what_was_got(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, text)
    assert "a.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such recipe"):
        Recipe.read(tmp_path / "none.yaml")


def test_overrides_are_read_as_yaml_and_make_what_is_not_there(tmp_path):
    recipe = read(
        tmp_path,
        SMALL,
        ["gates.steps=7", "prune.mlp_channels.sparsity=0.25", "recovery.train=lora", "seed=3"],
    )
    assert recipe.gates.steps == 7
    assert recipe.prune.mlp_channels.sparsity == 0.25
    assert recipe.recovery.train == "lora"
    assert recipe.seed == 3


@pytest.mark.parametrize(
    ("text", "overrides"),
    [("training: {mixed_precision: no}", ()), ("", ("training.mixed_precision=no",))],
)
def test_a_bare_no_is_the_word(tmp_path, text, overrides):
    recipe = read(tmp_path, SMALL + text, overrides)
    assert recipe.training.mixed_precision == "no"
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "again.yaml") == recipe


def test_overrides_reach_into_lists(tmp_path):
    text = SMALL + "evaluation: {perplexity: [{dataset: x}]}\n"
    recipe = read(tmp_path, text, ["evaluation.perplexity.0.window=64"])
    assert recipe.evaluation.perplexity[0].window == 64


@pytest.mark.parametrize(
    "override",
    [
        "steps",
        "=3",
        "model.source.x=3",
        "gates.steps=none",
        "seed=[",
        "evaluation.perplexity.4.x=1",
    ],
)
def test_a_wrong_override_is_refused(tmp_path, override):
    with pytest.raises(InputError):
        read(tmp_path, SMALL, [override])


def test_a_recipe_is_frozen(tmp_path):
    recipe = read(tmp_path, SMALL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 4


def test_rules_come_in_the_order_of_kinds(tmp_path):
    text = "model: {source: a/b}\nprune: {layers: {sparsity: 0.1}, heads: {sparsity: 0.5}}\n"
    assert list(read(tmp_path, text).prune.rules()) == ["heads", "layers"]


@pytest.mark.parametrize(
    ("gates", "curve"),
    [
        ({}, "at_once"),
        ({"variant": "capped", "curve": "gradual"}, "gradual"),
        ({"variant": "plus_plus", "dense": 0.5, "sparsify": 0.5}, "gradual"),
        ({"variant": "plus_plus", "dense": 0.5, "sparsify": 0.5, "curve": "at_once"}, "at_once"),
    ],
)
def test_the_budgets_curve_follows_the_variant_unless_it_is_named(gates, curve):
    recipe = Recipe.parse(
        {"model": {"source": "m"}, "prune": {"layers": {"sparsity": 0.5}}, "gates": gates}
    )
    assert recipe.gates.curve == curve
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("gates", "rate"),
    [
        ({}, "auto"),
        ({"prior": "activation"}, "auto"),
        ({"curve": "gradual"}, "auto"),
        ({"prior": "none"}, 0.05),
        ({"prior": "none", "learning_rate": 0.02}, 0.02),
        ({"learning_rate": 0.1}, 0.1),
        ({"variant": "plus_plus", "dense": 0.5, "sparsify": 0.5}, 0.05),
    ],
)
def test_the_rate_of_logits_is_found_where_they_start_from_a_prior(gates, rate):
    recipe = {"model": {"source": "a/b"}, "prune": {"mlp_channels": {"sparsity": 0.5}}}
    if not gates:
        assert Recipe.parse(recipe).gates.learning_rate == rate
    assert Recipe.parse(recipe | {"gates": gates}).gates.learning_rate == rate


@pytest.mark.parametrize(
    "gates", [{"prior": "none"}, {"variant": "plus_plus", "dense": 0.5, "sparsify": 0.5}]
)
def test_a_rate_can_be_found_only_from_a_priors_choice(gates):
    recipe = {"model": {"source": "a/b"}, "prune": {"mlp_channels": {"sparsity": 0.5}}}
    with pytest.raises(InputError, match="learning_rate: auto needs variant: capped and a prior"):
        Recipe.parse(recipe | {"gates": gates | {"learning_rate": "auto"}})
    with pytest.raises(InputError, match="learning_rate"):
        Recipe.parse(recipe | {"gates": gates | {"learning_rate": "fast"}})


@pytest.mark.parametrize(("gates", "rate"), [({}, 0.05), ({"learning_rate": 0.01}, 0.01)])
def test_logits_of_blocks_learn_at_their_own_rate(gates, rate):
    recipe = {"model": {"source": "a/b"}, "prune": {"weight_blocks": {"sparsity": 0.5}}}
    assert Recipe.parse(recipe | {"gates": gates}).gates.learning_rate == rate
    if not gates:
        found = Recipe.parse(recipe)
        assert found.gates.learning_rate == rate
        assert Recipe.parse(found.model_dump(mode="json")) == found
