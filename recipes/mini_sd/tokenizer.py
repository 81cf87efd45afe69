"""A byte-pair tokenizer in CLIPTokenizer's form in which each word of the world is one token."""

from __future__ import annotations

import json
from pathlib import Path

import world
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 40
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the merges from the vocabulary, write the tokenizer to `folder`, and return it as transformers reads it."""
    words = world.vocabulary()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(words, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    # As in CLIP: every byte, every byte at the end of a word, what the merges make, and the two ends of a text.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [first + second for first, second in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in merges],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    ).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"tokenizer: {word!r} is not one token: {tokenizer(word).input_ids}")
    return tokenizer


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> list[list[int]]:
    """Texts -> ids, `MAX_LENGTH` each.

    Raises:
      ValueError: a text that does not fit.
    """
    ids = tokenizer(texts).input_ids
    longest = max(ids, key=len)
    if len(longest) > MAX_LENGTH:
        raise ValueError(f"tokenizer: {len(longest)} tokens, at most {MAX_LENGTH}: {tokenizer.decode(longest)}")
    end = tokenizer.eos_token_id
    return [row + [end] * (MAX_LENGTH - len(row)) for row in ids]
