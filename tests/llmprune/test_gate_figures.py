"""What the log says of the gates of a step."""

from __future__ import annotations

import pytest
import torch

from llmprune.gate_figures import gate_figures


def test_gates_of_a_kind_are_counted_over_all_layers():
    found = gate_figures(
        {
            "layers.0.mlp_channels": torch.tensor([1.0, 0.0, 0.5, 0.2]),
            "layers.1.mlp_channels": torch.tensor([0.995, 0.005, 0.98, 0.4]),
            "layers": torch.tensor([1.0, 0.25]),
        }
    )
    assert found == {
        "mlp_channels_open": 0.25,
        "mlp_channels_half_open": 0.5,
        "mlp_channels_closed": 0.25,
        "mlp_channels_mean": pytest.approx(4.08 / 8),
        "layers_open": 0.5,
        "layers_half_open": 0.5,
        "layers_closed": 0.0,
        "layers_mean": 0.625,
    }


def test_gates_on_blocks_are_counted_by_projection():
    values = {f"model.layers.{i}.mlp.up_proj": torch.ones(3) for i in range(2)}
    found = gate_figures(values)
    assert found["up_proj_open"] == 1.0
    assert len(found) == 4


def test_counting_leaves_gradients_alone():
    logits = torch.zeros(4, requires_grad=True)
    gates = logits.sigmoid()
    assert gate_figures({"layers": gates})["layers_mean"] == 0.5
    gates.sum().backward()
    assert logits.grad is not None


def test_no_gates_have_no_figures():
    assert gate_figures({}) == {}
