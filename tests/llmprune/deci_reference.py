"""A forward pass over a DeciLM checkpoint, as the servers that have a class for it compute it.

Only config.json and the tensors are read; counts are worked out from `block_configs` alone.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu


def mlp_width(ffn_mult, hidden_size):
    width = int(2 * ffn_mult * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


def rms_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotate(x, theta):
    size, length = x.shape[-1], x.shape[-2]
    # in float32, as everyone rotates
    frequencies = 1 / theta ** (torch.arange(0, size, 2).float() / size)
    angles = torch.arange(length).float()[:, None] * frequencies
    cos, sin = angles.cos().double().repeat(1, 2), angles.sin().double().repeat(1, 2)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class DeciLM:
    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.used = set()

    def take(self, name, shape):
        value = self.weights[name]
        assert value.shape == shape, (name, value.shape, shape)
        self.used.add(name)
        return value.double()

    def project(self, x, name, outputs, *, biased=False):
        weight = self.take(f"{name}.weight", (outputs, x.shape[-1]))
        return linear(x, weight, self.take(f"{name}.bias", (outputs,)) if biased else None)

    def attend(self, x, prefix, group):
        heads = self.config["num_attention_heads"]
        size = self.config["hidden_size"] // heads
        biased = self.config["qkv_bias"]
        parts = []
        for name, count in (("q", heads), ("k", heads // group), ("v", heads // group)):
            value = self.project(x, f"{prefix}.{name}_proj", count * size, biased=biased)
            value = value.unflatten(-1, (count, size)).transpose(1, 2)
            value = value if name == "v" else rotate(value, self.config["rope_theta"])
            parts.append(value.repeat_interleave(heads // count, 1))
        out = scaled_dot_product_attention(*parts, is_causal=True)
        out = out.transpose(1, 2).flatten(-2)
        return self.project(out, f"{prefix}.o_proj", x.shape[-1])

    def feed(self, x, prefix, width):
        gate = silu(self.project(x, f"{prefix}.gate_proj", width))
        up = self.project(x, f"{prefix}.up_proj", width)
        return self.project(gate * up, f"{prefix}.down_proj", x.shape[-1])

    def logits(self, tokens):
        config = self.config
        size, eps = config["hidden_size"], config["rms_norm_eps"]
        table = self.take("model.embed_tokens.weight", (config["vocab_size"], size))
        stream = embedding(tokens, table)
        assert not config["block_configs"][0]["attention"]["no_op"]
        for index, block in enumerate(config["block_configs"]):
            prefix = f"model.layers.{index}"
            if not block["attention"]["no_op"]:
                norm = self.take(f"{prefix}.input_layernorm.weight", (size,))
                group = block["attention"]["n_heads_in_group"]
                x = rms_norm(stream, norm, eps)
                stream = stream + self.attend(x, f"{prefix}.self_attn", group)
            if not block["ffn"]["no_op"]:
                norm = self.take(f"{prefix}.post_attention_layernorm.weight", (size,))
                width = mlp_width(block["ffn"]["ffn_mult"], size)
                stream = stream + self.feed(rms_norm(stream, norm, eps), f"{prefix}.mlp", width)
        x = rms_norm(stream, self.take("model.norm.weight", (size,)), eps)
        head = table
        if not config["tie_word_embeddings"]:
            head = self.take("lm_head.weight", (config["vocab_size"], size))
        assert self.used == set(self.weights), "weights that no one reads"
        return linear(x, head)
