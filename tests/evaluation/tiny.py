"""A model with random weights and a byte-level tokenizer, in Hugging Face format."""

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from simreg.recipe.tokenizer import train_bpe

SENTENCE = "the of and to in a river stone bird ran over under green old seven house said water"
WORDS = SENTENCE.split()


def text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def save(folder: Path, *, seed: int = 0, max_length: int = 64) -> Path:
    """Weights large enough that answers differ clearly."""
    tokenizer = train_bpe((text(i, 200) for i in range(20)), 300)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
