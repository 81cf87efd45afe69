"""A byte-pair tokenizer in CLIPTokenizer's format; each word of the world is one token."""

from __future__ import annotations

import json
from pathlib import Path

import world
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ti_jax.weights.tokenizers import END, tokenizer_of_merges

MAX_LENGTH = 40


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in `folder`, read by transformers; trained on the vocabulary if it does not exist yet.

    The trainer merges equally frequent pairs in no fixed order, so a resumed run must keep its first ids.
    """
    words = world.vocabulary()
    if not (folder / "vocab.json").exists():
        _learn(words, folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"tokenizer: {word!r} is not one token: {tokenizer(word).input_ids}")
    return tokenizer


def _learn(words: list[str], folder: Path) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(words, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    folder.mkdir(parents=True, exist_ok=True)
    whole = tokenizer_of_merges([tuple(pair) for pair in merges], END, MAX_LENGTH)
    whole.save_pretrained(folder)
    # transformers 5 writes tokenizer.json only; older programs read these three.
    special = {f"{name}_token": getattr(whole, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    vocabulary = dict(sorted(whole.get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> list[list[int]]:
    """Texts -> ids, `MAX_LENGTH` each.

    Raises:
      ValueError: a text is too long.
    """
    ids = tokenizer(texts).input_ids
    longest = max(ids, key=len)
    if len(longest) > MAX_LENGTH:
        raise ValueError(f"tokenizer: {len(longest)} tokens, at most {MAX_LENGTH}: {tokenizer.decode(longest)}")
    end = tokenizer.eos_token_id
    return [row + [end] * (MAX_LENGTH - len(row)) for row in ids]
