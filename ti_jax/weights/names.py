"""Map a checkpoint's names and layouts to the parameter tree's. This is the only place that knows both.

A tree path is the checkpoint key's dot path with each number joined to its parent by ``_``::

    down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight
    down_blocks_0/attentions_1/transformer_blocks_0/attn1/to_out_0/kernel

Only the last word differs: PyTorch's ``weight`` is ``kernel``, ``scale`` or ``embedding`` in Flax. Which of them it is
follows from the tree.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

TreePath = tuple[str, ...]

CONV2D = (2, 3, 1, 0)  # PyTorch [out, in, height, width] -> Flax [height, width, in, out]
DENSE = (1, 0)  # PyTorch [out, in] -> Flax [in, out]

FLAX_NAMES_OF_WEIGHT = ("kernel", "scale", "embedding")

# diffusers' names of the VAE's attention layers until 0.18; the checkpoints on the hub still have them.
VAE_ATTENTION_RENAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out_0"}

# A buffer of 0, 1, 2, ... that transformers used to save with the text encoder's weights.
TEXT_ENCODER_BUFFERS = frozenset({"embeddings/position_ids"})
# The same for both towers, and the temperature of CLIP's training loss.
CLIP_BUFFERS = frozenset({"text_model/embeddings/position_ids", "vision_model/embeddings/position_ids", "logit_scale"})


def module_path(key: str, component: str) -> TreePath | None:
    """Tree path of a checkpoint key, its last word still PyTorch's (``weight`` or ``bias``).

    `component` is the name of the folder in a diffusers pipeline. Historic names are converted for ``vae`` (attention
    layers) and for ``text_encoder`` and ``text_encoder_2`` (the ``text_model.`` prefix, which transformers 4 wrote and
    5 does not). Returns None for a buffer that is not a weight.
    """
    words: list[str] = []
    for word in key.split("."):
        if word.isdecimal() and words:
            words[-1] += f"_{word}"
        else:
            words.append(word)
    if component.startswith("text_encoder"):
        if words[0] == "text_model":
            words = words[1:]
        if "/".join(words) in TEXT_ENCODER_BUFFERS:
            return None
    if component == "clip" and "/".join(words) in CLIP_BUFFERS:
        return None
    if component == "vae":
        in_attention = any(word.startswith("attentions_") for word in words)
        words = [VAE_ATTENTION_RENAMES.get(word, word) if in_attention else word for word in words]
    return tuple(words)


def tree_path(key: str, component: str, tree: Container[TreePath]) -> TreePath | None:
    """Path in `tree` (a flattened parameter tree, or its set of paths) for a checkpoint key.

    Returns None for a buffer that is not a weight (see `module_path`), and a path that is not in `tree` if the tree has
    no such parameter.
    """
    path = module_path(key, component)
    if path is None or path[-1] != "weight":
        return path
    for name in FLAX_NAMES_OF_WEIGHT:
        if (*path[:-1], name) in tree:
            return (*path[:-1], name)
    return path


def tree_layout(shape: tuple[int, ...], path: TreePath, target_ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How a checkpoint tensor becomes a leaf: ``tensor.reshape(first).transpose(second)``.

    Args:
      shape: the tensor's shape in the checkpoint.
      path: its tree path; only kernels change their layout.
      target_ndim: rank of the leaf. A 1x1 convolution and a linear layer are equivalent, and a checkpoint may have one
        where the model has the other.
    """
    if path[-1] == "kernel":
        if target_ndim == 2 and len(shape) == 4 and shape[2:] == (1, 1):
            shape = shape[:2]
        elif target_ndim == 4 and len(shape) == 2:
            shape = (*shape, 1, 1)
        if len(shape) == target_ndim == 4:
            return shape, CONV2D
        if len(shape) == target_ndim == 2:
            return shape, DENSE
    return shape, tuple(range(len(shape)))


def to_tree_layout(tensor: np.ndarray, path: TreePath, target_ndim: int) -> np.ndarray:
    """The checkpoint's `tensor` in the layout of the leaf at `path`, as a view without a copy."""
    shape, axes = tree_layout(tensor.shape, path, target_ndim)
    return tensor.reshape(shape).transpose(axes)


def shape_in_tree(shape: tuple[int, ...], path: TreePath, target_ndim: int) -> tuple[int, ...]:
    """Shape of a checkpoint tensor of `shape` in the layout of the leaf at `path`."""
    shape, axes = tree_layout(shape, path, target_ndim)
    return tuple(shape[axis] for axis in axes)
