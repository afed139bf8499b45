from __future__ import annotations

import json

import pytest

from llmprune.errors import InputError
from llmprune.plan import PrunePlan
from llmprune.recipe import UNIT_KINDS
from llmprune.surgery import cut
from llmprune.units import LayerWidths, map_units
from tests.llmprune.tiny import FAMILIES, plan_for, tiny_model


@pytest.fixture(scope="module")
def llama():
    """Three layers of 6 heads in 2 KV groups, 40 MLP channels, 48 hidden channels."""
    return tiny_model("llama", ratio=3)


@pytest.fixture(scope="module")
def mha():
    """Three layers of 2 heads without GQA."""
    return tiny_model("llama", ratio=1)


def plan_with(model, kept, scale=None):
    return PrunePlan(model=map_units(model).signature(), kept=kept, scale=scale or {})


def refusal(model, kept, scale=None):
    with pytest.raises(InputError) as error:
        plan_with(model, kept, scale).validate(map_units(model))
    return str(error.value)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_json_round_trips_to_the_byte(family, scaled):
    plan = plan_for(tiny_model(family), UNIT_KINDS, scaled=scaled, differ=True)
    text = plan.to_json()
    again = PrunePlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert json.loads(text)["format"] == "llmprune-plan/1"


def test_a_group_is_one_line_of_json():
    text = plan_for(tiny_model("llama"), ("mlp_channels",)).to_json()
    lines = [line for line in text.splitlines() if line.startswith('"layers.')]
    assert len(lines) == 3
    assert text.endswith("\n}\n")


def test_a_plan_of_differing_layers_round_trips():
    model = tiny_model("llama", ratio=3)
    pruned = cut(model, plan_for(model, ("mlp_channels",), differ=True), form="per_layer")
    plan = plan_for(pruned, ("mlp_channels",))
    assert plan.model["intermediate_size"] == [26, 25, 24]
    again = PrunePlan.from_json(plan.to_json())
    again.validate(map_units(pruned))
    assert again.to_json() == plan.to_json()


def test_a_plan_written_by_hand_is_read(llama, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(
        """{"format": "llmprune-plan/1",
            "model": {"family": "llama", "hidden_size": 48, "head_dim": 8, "num_hidden_layers": 3,
                      "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40},
            "kept": {"layers.1.heads": [0, 2, 3, 4], "mlp_sublayers": [0, 2]},
            "scale": {"mlp_sublayers": [1, 0.5]}}"""
    )
    plan = PrunePlan.read(file)
    plan.validate(map_units(llama))
    assert plan.kept == {"layers.1.heads": (0, 2, 3, 4), "mlp_sublayers": (0, 2)}
    assert plan.scale == {"mlp_sublayers": (1.0, 0.5)}
    widths = plan.widths(map_units(llama))
    assert widths.layers[1] == LayerWidths(4, 2, 40, attention=True, mlp=False)
    assert widths.layers[0] == LayerWidths(6, 2, 40)


def test_a_plan_without_kept_or_scale_keeps_everything(llama):
    model = json.dumps(map_units(llama).signature())
    plan = PrunePlan.from_json(f'{{"format": "llmprune-plan/1", "model": {model}}}')
    plan.validate(map_units(llama))
    assert plan.widths(map_units(llama)) == map_units(llama).dense


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a plan must be JSON"),
        ("{", "a plan must be JSON"),
        ("[]", "format must be 'llmprune-plan/1', got 'list'"),
        ("{}", "format must be 'llmprune-plan/1', got None"),
        ('{"format": "llmprune-plan/9"}', "got 'llmprune-plan/9'"),
        ('{"format": "llmprune-plan/1"}', "model must be a mapping, got NoneType"),
        ('{"format": "llmprune-plan/1", "model": {}, "kept": []}', "kept must map group names"),
        ('{"format": "llmprune-plan/1", "model": {}, "kept": {"a": 1}}', "lists of ints"),
        ('{"format": "llmprune-plan/1", "model": {}, "kept": {"a": [1.5]}}', "lists of ints"),
        ('{"format": "llmprune-plan/1", "model": {}, "kept": {"a": [true]}}', "lists of ints"),
        ('{"format": "llmprune-plan/1", "model": {}, "scale": {"a": ["x"]}}', "lists of floats"),
    ],
)
def test_what_is_no_plan_is_refused(text, message):
    with pytest.raises(InputError, match=message) as error:
        PrunePlan.from_json(text, name="some.json")
    assert str(error.value).startswith("some.json: ")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"absent\.json: a plan must be a readable file"):
        PrunePlan.read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"family": "qwen2", "ratio": 3}, "family llama"),
        ({"family": "llama", "ratio": 2}, "hidden_size 48"),
        ({"family": "llama", "ratio": 3, "layers": 2}, "num_hidden_layers 3"),
    ],
)
def test_a_plan_for_another_model_is_refused(llama, other, key):
    plan = plan_for(tiny_model(**other), ("mlp_channels",))
    with pytest.raises(InputError, match=f"must be for this model, which has {key}, got one made"):
        plan.validate(map_units(llama))


@pytest.mark.parametrize("kept", [(-1, 2), (0, 40), (3, 2), (2, 2)])
def test_indices_ascend_and_are_there(llama, kept):
    message = refusal(llama, {"layers.0.mlp_channels": kept})
    assert message.startswith(
        "plan: kept.layers.0.mlp_channels must be ascending indices in [0, 40"
    )
    assert str(list(kept)) in message


@pytest.mark.parametrize("kind", ["layers", "layers.0.mlp_channels", "hidden_channels"])
def test_a_group_keeps_at_least_one_unit(llama, kind):
    assert f"kept.{kind} must keep at least one unit" in refusal(llama, {kind: ()})


@pytest.mark.parametrize("name", ["layers.3.heads", "heads", "mlp", "layers.0.layers"])
def test_an_unknown_group_is_refused(llama, name):
    assert f"kept.{name} must name a unit group" in refusal(llama, {name: (0,)})


def test_a_scale_has_one_factor_per_kept_index(llama):
    message = refusal(llama, {"layers": (0, 1)}, {"layers": (1.0,)})
    assert message == "plan: scale.layers must have one factor per kept index"
    assert "scale.layers must have" in refusal(llama, {}, {"layers": (1.0, 1.0, 1.0)})


@pytest.mark.parametrize(
    ("heads", "counts"),
    [((0, 1, 3), "{0: 2, 1: 1}"), ((0, 1), "{0: 2, 1: 0}")],
)
def test_kv_groups_of_a_layer_keep_equally_many_heads(llama, heads, counts):
    message = refusal(llama, {"layers.1.heads": heads})
    assert message.startswith("plan: layer 1 must keep the same number of query heads")
    assert message.endswith(f"got {counts}")


def test_heads_of_a_removed_kv_group_go_with_it(llama):
    kept = {"layers.1.heads": (0, 1, 3), "layers.1.kv_groups": (0,)}
    widths = plan_with(llama, kept).widths(map_units(llama))
    assert widths.layers[1] == LayerWidths(2, 1, 40)


def test_without_gqa_heads_and_kv_groups_are_the_same_units(mha):
    unit_map = map_units(mha)
    for kind in ("heads", "kv_groups"):
        widths = plan_with(mha, {f"layers.0.{kind}": (1,)}).widths(unit_map)
        assert widths.layers[0] == LayerWidths(1, 1, 40)
    message = refusal(mha, {"layers.0.heads": (1,), "layers.0.kv_groups": (0,)})
    assert message.startswith("plan: layer 0 must keep a head, got none")


def test_a_removed_layer_needs_no_other_agreement(llama):
    kept = {"layers": (0, 2), "layers.1.heads": (0, 1, 3)}
    plan = plan_with(llama, kept)
    plan.validate(map_units(llama))
    assert plan.widths(map_units(llama)).layers[1] is None


def test_a_model_keeps_a_layer(llama):
    kept = {"layers": (0,), "attention_sublayers": (1,), "mlp_sublayers": (2,)}
    assert refusal(llama, kept) == "plan: must keep at least one layer, got none"


@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_widths_are_those_of_the_cut_model(family, differ):
    model = tiny_model(family, ratio=3)
    kinds = ("heads", "kv_groups", "mlp_channels", "hidden_channels", "layers")
    plan = plan_for(model, kinds, differ=differ)
    widths = plan.widths(map_units(model))
    found = map_units(cut(model, plan, form="per_layer")).dense
    assert found.hidden_size == widths.hidden_size
    assert found.layers == widths.kept_layers
