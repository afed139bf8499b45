"""Qwen3: Llama's layout, an RMS norm over head_dim after the q and k projections."""

from dataclasses import replace

from llmprune.architectures.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    family="qwen3",
    layer_weights={
        **LLAMA.layer_weights,
        "self_attn.q_norm.weight": "head_dim",
        "self_attn.k_norm.weight": "head_dim",
    },
    qk_normed=("self_attn.q_proj", "self_attn.k_proj"),
    stands_in=None,
    biased_as=None,
)
