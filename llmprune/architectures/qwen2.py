"""Qwen2 and Qwen2.5: Llama's layout; q, k and v always carry a bias."""

from dataclasses import replace

from llmprune.architectures.llama import LLAMA

QWEN2 = replace(LLAMA, family="qwen2", stands_in=None, biased_as=("llama", ("use_sliding_window",)))
