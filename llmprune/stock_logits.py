"""Load a folder with stock transformers in this process and compare its logits with recorded ones.

Run by path in a fresh process (`python -P stock_logits.py MODEL REFERENCE`), so that nothing of
llmprune is imported: what it finds is what a stranger with transformers alone would get. It prints
one line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

# Pad tokens put before the row in the left-padding check.
PADDING = 5


def forward_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of whole rows at once: (batch, length) -> (batch, length, vocab_size)."""
    return model(input_ids=tokens, use_cache=False).logits


def cached_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The same through the KV cache: half a row at once, the rest token by token."""
    half = tokens.shape[1] // 2
    output = model(input_ids=tokens[:, :half], use_cache=True)
    parts = [output.logits]
    for position in range(half, tokens.shape[1]):
        output = model(
            input_ids=tokens[:, position : position + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        parts.append(output.logits)
    return torch.cat(parts, 1)


def left_padded_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The same with padding before the rows, as a batch of unequal prompts has."""
    padding = torch.full((tokens.shape[0], PADDING), model.config.pad_token_id or 0)
    padded = torch.cat([padding.to(tokens), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits[:, PADDING:]


CHECKS = {
    "forward": forward_logits,
    "kv_cache": cached_logits,
    "left_padding": left_padded_logits,
}


def compare(model: Any, tokens: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Largest absolute difference of every check from the recorded logits."""
    with torch.no_grad():
        return {
            name: float((check(model, tokens).cpu() - expected).abs().max())
            for name, check in CHECKS.items()
        }


def main() -> None:
    """Compare and print."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, reference = sys.argv[1:3]
    has_code = "auto_map" in json.loads((Path(folder) / "config.json").read_text())
    tensors = load_file(reference)
    # A folder of `export.format: per_layer` brings its modeling file; a stock one runs no code.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=has_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    model.eval()
    found = {"float32": compare(model, tensors["tokens"], tensors["float32"])}
    if "float64" in tensors:
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
        found["float64"] = compare(model, tensors["tokens"], tensors["float64"])
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    note = {
        "model_class": type(model).__name__,
        "remote_code": has_code,
        "missing_keys": sorted(set(info["missing_keys"]) - tied),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "llmprune_imported": "llmprune" in sys.modules,
        "largest_logit": float(tensors["float32"].abs().max()),
        "max_abs_difference": found,
    }
    print(json.dumps(note))


if __name__ == "__main__":
    main()
