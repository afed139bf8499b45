"""Tiny random models of every family, and plans over every kind of unit."""

from __future__ import annotations

import importlib

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from llmprune.gates import attach_gates
from llmprune.plan import PrunePlan
from llmprune.recipe import UNIT_KINDS
from llmprune.units import map_units

# a bar for every weight that a cut loads would bury a failure's output
logging.disable_progress_bar()
# several threads take four times as long as one on matrices this small
torch.set_num_threads(1)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2")
VOCAB = 61


def tiny_model(
    family,
    *,
    ratio=2,
    kv_groups=2,
    tied=False,
    biased=False,
    layers=3,
    dtype=torch.float64,
    seed=0,
):
    """A random model: KV groups of `ratio` query heads (GPT-2: as many heads), head_dim 8."""
    heads = kv_groups * ratio
    shared = {
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "gpt2":
        options = {
            "n_embd": 8 * heads,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": 40,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    else:
        options = {
            "hidden_size": 8 * heads,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_groups,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
        }
        if family != "phi3":
            options["head_dim"] = 8
        # a large eps, so that a forgotten rescale of eps shows
        options["rms_norm_eps"] = 0.03
    if family == "llama":
        options |= {"attention_bias": biased, "mlp_bias": biased}
    if family == "qwen3":
        options |= {"attention_bias": biased}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**shared, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = 0.3 * torch.randn_like(parameter)
                norm = "norm" in name or "ln_" in name
                parameter.copy_(noise + 1 if norm and name.endswith("weight") else noise)
            else:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return model


def tokens(batch=2, length=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def logits(model, input_ids=None):
    with torch.no_grad():
        return model(tokens() if input_ids is None else input_ids).logits


def masked_logits(model, plan, input_ids=None):
    """Logits of the gated model with the plan's gates; the model is left ungated."""
    gates = attach_gates(model, map_units(model), UNIT_KINDS)
    gates.set_plan(plan)
    found = logits(model, input_ids)
    gates.detach()
    return found


def use_double_norms(monkeypatch):
    """Make every RMS norm compute in float64, as the rest of a float64 model does."""

    def forward(self, hidden_states):
        wide = hidden_states.double()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.double() * wide * scale).to(hidden_states.dtype)

    for family in FAMILIES:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in dir(module):
            if name.endswith("RMSNorm"):
                monkeypatch.setattr(getattr(module, name), "forward", forward)


def is_mha(unit_map, layer):
    widths = unit_map.layer(layer)
    return widths.num_attention_heads == widths.num_key_value_heads


def plan_for(model, kinds, *, scaled=False, differ=False, seed=0):
    """A random plan that removes some units of each kind; `differ` lets layers' widths differ."""
    unit_map = map_units(model)
    generator = torch.Generator().manual_seed(seed)
    kept, scale = {}, {}
    for name, group in unit_map.groups.items():
        if group.kind not in kinds:
            continue
        count = max(1, group.num_units * 2 // 3)
        if differ and group.layer is not None:
            count = max(1, count - group.layer)
        if group.kind == "heads":
            layer = unit_map.layer(group.layer)
            ratio = layer.num_attention_heads // layer.num_key_value_heads
            per_group = max(1, ratio - 1 - group.layer * differ)
            chosen = []
            if ratio == 1:
                chosen = list(range(count))
            else:
                for kv in range(layer.num_key_value_heads):
                    order = torch.randperm(ratio, generator=generator)[:per_group]
                    chosen += [kv * ratio + int(head) for head in order]
        else:
            chosen = torch.randperm(group.num_units, generator=generator)[:count].tolist()
            own_heads = kept.get(f"layers.{group.layer}.heads", ())
            if group.kind == "kv_groups" and is_mha(unit_map, group.layer) and own_heads:
                # heads and KV groups are then the same units, and their common part stays
                chosen = {*own_heads, chosen[0]}
        kept[name] = tuple(sorted(chosen))
        if scaled:
            factors = torch.rand(len(chosen), generator=generator, dtype=torch.float64) + 0.5
            scale[name] = tuple(factors.tolist())
    return PrunePlan(model=unit_map.signature(), kept=kept, scale=scale)
