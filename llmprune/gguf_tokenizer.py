"""The tokenizer of a GGUF file: byte-level BPE whose pre-tokenizer llama.cpp has a name for.

llama.cpp splits text by rules of its own, one set for each name in `tokenizer.ggml.pre`; a
tokenizer is only written where its rules are one of those sets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A llama.cpp name for each list of splitting rules, with whether whole words may skip the merges.
PRE_TOKENIZERS: dict[tuple[str, ...], tuple[str, bool]] = {
    ("gpt2",): ("gpt-2", False),
    ("digits", "gpt2"): ("smollm", False),
    (LLAMA3_SPLIT,): ("llama-bpe", True),
    (LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),): ("qwen2", False),
}


@dataclass(frozen=True)
class GgufTokenizer:
    """What llama.cpp needs of a tokenizer; `tokens` and `types` have an entry for every id."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add the metadata to a file under construction."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(folder: Path, vocab_size: int) -> GgufTokenizer:
    """Read a model folder's tokenizer.

    Args:
        folder: Of the model.
        vocab_size: Rows of the embedding; ids without a token become unused ones.

    Raises:
        InputError: There is no tokenizer, or llama.cpp has no rules for its kind.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        spelled = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"--format gguf needs the model's tokenizer in {folder.name} as tokenizer.json, found "
            "none; copy the dense model's there"
        ) from error
    pre, refusal = _pre_tokenizer(spelled)
    if refusal is None:
        refusal = _why_not(spelled, len(tokenizer), vocab_size)
    if pre is None or refusal is not None:
        raise InputError(
            f"--format gguf can't write this tokenizer: {refusal}; use --format padded and "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    tokens, types = _vocabulary(spelled, vocab_size)
    ids = tokenizer("a").input_ids
    names = {"bos": "bos", "eos": "eos", "pad": "pad", "unk": "unk"}
    special = {name: getattr(tokenizer, f"{key}_token_id") for name, key in names.items()}
    return GgufTokenizer(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=tuple(_merge(merge) for merge in spelled["model"]["merges"]),
        special={name: index for name, index in special.items() if index is not None},
        add_bos=special["bos"] is not None and ids[0] == special["bos"],
        add_eos=special["eos"] is not None and ids[-1] == special["eos"],
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _pre_tokenizer(spelled: dict[str, Any]) -> tuple[str | None, str | None]:
    """llama.cpp's name of the splitting rules, or why there is none."""
    model = spelled["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-style BPE" if model.get("byte_fallback") else model["type"]
        return None, f"it must be byte-level BPE, it is {kind}"
    stated = spelled["pre_tokenizer"] or {}
    parts = stated.get("pretokenizers", [stated])
    rules = [_rule(part) for part in parts]
    if None in rules or not parts or parts[-1].get("type") != "ByteLevel":
        return None, "its pre-tokenizer is none of those that llama.cpp has rules for"
    found = PRE_TOKENIZERS.get(tuple(rule for rule in rules if rule))
    if found is None:
        return None, "its pre-tokenizer is none of those that llama.cpp has rules for"
    name, skips_merges = found
    if bool(model.get("ignore_merges")) != skips_merges:
        return None, f"ignore_merges must be {skips_merges} under the rules of {name}"
    return name, None


def _rule(part: dict[str, Any]) -> str | None:
    """One step of a pre-tokenizer; "" for one that only spells bytes, None for an unknown one."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "gpt2" if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return part["pattern"].get("Regex")
    return None


def _why_not(spelled: dict[str, Any], num_tokens: int, vocab_size: int) -> str | None:
    model = spelled["model"]
    if (spelled["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return f"llama.cpp does not normalize text ({spelled['normalizer']['type']})"
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            return f"llama.cpp has no {key}"
    if num_tokens > vocab_size:
        return f"it has {num_tokens} tokens and the model embeds {vocab_size}"
    for token in spelled["added_tokens"]:
        for key in ("single_word", "lstrip", "rstrip"):
            if token.get(key):
                return f"llama.cpp has no {key} ({token['content']})"
    return None


def _vocabulary(
    spelled: dict[str, Any], vocab_size: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in spelled["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in spelled["added_tokens"]:
        index = added["id"]
        tokens[index] = added["content"]
        types[index] = CONTROL if added["special"] else USER_DEFINED
    return tuple(tokens), tuple(types)


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)
