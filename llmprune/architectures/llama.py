"""Llama and what shares its layout: SmolLM2, Llama 2 and 3, Mistral."""

from dataclasses import replace

from llmprune.architectures.table import Architecture, Sublayer

LLAMA = Architecture(
    family="llama",
    layers="model.layers",
    embeddings=("model.embed_tokens",),
    attention=Sublayer(module="self_attn", norm="input_layernorm", write="self_attn.o_proj"),
    mlp=Sublayer(module="mlp", norm="post_attention_layernorm", write="mlp.down_proj"),
    final_norm="model.norm",
    head="lm_head",
    model_weights={
        "model.embed_tokens.weight": "vocab hidden",
        "model.norm.weight": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    layer_weights={
        "input_layernorm.weight": "hidden",
        "self_attn.q_proj.weight": "query hidden",
        "self_attn.q_proj.bias": "query",
        "self_attn.k_proj.weight": "key_value hidden",
        "self_attn.k_proj.bias": "key_value",
        "self_attn.v_proj.weight": "key_value hidden",
        "self_attn.v_proj.bias": "key_value",
        "self_attn.o_proj.weight": "hidden query",
        "self_attn.o_proj.bias": "hidden",
        "post_attention_layernorm.weight": "hidden",
        "mlp.gate_proj.weight": "mlp hidden",
        "mlp.gate_proj.bias": "mlp",
        "mlp.up_proj.weight": "mlp hidden",
        "mlp.up_proj.bias": "mlp",
        "mlp.down_proj.weight": "hidden mlp",
        "mlp.down_proj.bias": "hidden",
    },
    norm_kind="rms",
    config_names={},
    # LlamaConfig refuses a hidden_size that is not a multiple of the number of heads;
    # MistralConfig has no such rule, the same weight names and, with no window, the same function.
    stands_in=("mistral", ("attention_bias", "mlp_bias")),
    biased_as=("llama", ()),
    bias_keys=("attention_bias", "mlp_bias"),
)

MISTRAL = replace(LLAMA, family="mistral", stands_in=None, biased_as=("llama", ("sliding_window",)))
