"""Phi-3 and Phi-4-mini: fused qkv_proj (q, k, v rows) and gate_up_proj (gate, up rows)."""

from dataclasses import replace

from llmprune.architectures.llama import LLAMA

PHI3 = replace(
    LLAMA,
    family="phi3",
    layer_weights={
        "input_layernorm.weight": "hidden",
        "self_attn.qkv_proj.weight": "query+key_value+key_value hidden",
        "self_attn.o_proj.weight": "hidden query",
        "self_attn.o_proj.bias": "hidden",
        "post_attention_layernorm.weight": "hidden",
        "mlp.gate_up_proj.weight": "mlp+mlp hidden",
        "mlp.down_proj.weight": "hidden mlp",
        "mlp.down_proj.bias": "hidden",
    },
    stands_in=None,
    biased_as=None,
)
