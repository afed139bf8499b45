"""GPT-2: Conv1D weights (inputs first), fused c_attn, LayerNorm, learned positions, tied head."""

from llmprune.architectures.table import Architecture, Sublayer

GPT2 = Architecture(
    family="gpt2",
    layers="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    attention=Sublayer(module="attn", norm="ln_1", write="attn.c_proj"),
    mlp=Sublayer(module="mlp", norm="ln_2", write="mlp.c_proj"),
    final_norm="transformer.ln_f",
    head="lm_head",
    model_weights={
        "transformer.wte.weight": "vocab hidden",
        "transformer.wpe.weight": "position hidden",
        "transformer.ln_f.weight": "hidden",
        "transformer.ln_f.bias": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    layer_weights={
        "ln_1.weight": "hidden",
        "ln_1.bias": "hidden",
        "attn.c_attn.weight": "hidden query+key_value+key_value",
        "attn.c_attn.bias": "query+key_value+key_value",
        "attn.c_proj.weight": "query hidden",
        "attn.c_proj.bias": "hidden",
        "ln_2.weight": "hidden",
        "ln_2.bias": "hidden",
        "mlp.c_fc.weight": "hidden mlp",
        "mlp.c_fc.bias": "mlp",
        "mlp.c_proj.weight": "mlp hidden",
        "mlp.c_proj.bias": "hidden",
    },
    norm_kind="layer",
    config_names={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    head_dim_free=False,
    biased_as=("gpt2", ()),
    norm_eps="layer_norm_epsilon",
)
