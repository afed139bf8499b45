"""Tiny models with a tokenizer, and a few rows of every task in the layout of --data."""

from __future__ import annotations

import gzip
import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", "the", "a", "on", "under", "mat", "roof", "quickly"]
NOUNS = ["cat", "dog", "man", "tree", "house"]
VERBS = ["sat", "ran", "saw", "ate"]
WORDS += NOUNS + VERBS


def save_model(folder, *, intermediate_size=24, seed=0):
    """A random Llama that knows the words that the rows are made of."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        # a wide range, so that answers differ from document to document
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def sentence(rng):
    return f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} on the {rng.choice(NOUNS)}"


def row_of(task, index, rng):
    choices = [sentence(rng) for _ in range(4)]
    labels = {"text": choices, "label": ["A", "B", "C", "D"]}
    answer = rng.randrange(4)
    rows = {
        "hellaswag": {
            "activity_label": "cat",
            "ctx_a": sentence(rng),
            "ctx_b": "the dog",
            "endings": choices,
            "label": str(answer),
        },
        "piqa": {
            "goal": sentence(rng),
            "sol1": choices[0],
            "sol2": choices[1],
            "label": answer % 2,
        },
        "arc": {"question": sentence(rng), "choices": labels, "answerKey": "ABCD"[answer]},
        "winogrande": {
            "sentence": "the cat saw the dog under _ quickly",
            "option1": rng.choice(NOUNS),
            "option2": rng.choice(NOUNS),
            "answer": str(answer % 2 + 1),
        },
        "boolq": {"question": choices[0], "passage": choices[1], "answer": answer % 2 == 0},
        "openbookqa": {"question_stem": choices[0], "choices": labels, "answerKey": "ABCD"[answer]},
        "lambada": {"text": sentence(rng)},
        "blimp": {"sentence_good": choices[0], "sentence_bad": choices[1]},
        "mmlu": {"question": choices[0], "choices": choices, "answer": answer},
        "gsm8k": {"question": choices[0], "answer": f"{choices[1]} #### {index}"},
    }
    return rows[task]


FILES = {
    "hellaswag/hellaswag_val": "hellaswag",
    "piqa/piqa_val": "piqa",
    "arc/ARC-Easy_test": "arc",
    "arc/ARC-Easy_val": "arc",
    "arc/ARC-Challenge_test": "arc",
    "winogrande/winogrande_xl_dev": "winogrande",
    "boolq/boolq_val": "boolq",
    "openbookqa/openbookqa_test": "openbookqa",
    "lambada/lambada_openai_test": "lambada",
    "gsm8k/gsm8k_train": "gsm8k",
    "gsm8k/gsm8k_test": "gsm8k",
}


def save_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def save_data(folder, *, count=12):
    """Files of all tasks but blimp and mmlu, plain and compressed in turn."""
    rng = random.Random(0)
    for number, (stem, task) in enumerate(FILES.items()):
        ending = ".jsonl" if number % 2 else ".jsonl.gz"
        rows = [row_of(task, i, rng) for i in range(count)]
        save_rows(folder / f"{stem}{ending}", rows)
    return folder


def save_groups(folder, blimp, mmlu):
    """Files of blimp and mmlu with so many rows of each subtask, {subtask: rows}."""
    rng = random.Random(1)
    rows = [{**row_of("blimp", i, rng), "UID": u} for u, n in blimp.items() for i in range(n)]
    save_rows(folder / "blimp" / "blimp_all.jsonl", rows)
    for split in ("test", "dev"):
        rows = [{**row_of("mmlu", i, rng), "subject": s} for s, n in mmlu.items() for i in range(n)]
        save_rows(folder / "mmlu" / f"mmlu_{split}.jsonl", rows)
    return folder
