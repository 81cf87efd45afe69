"""Scaled dot-product attention, with the fastest implementation for each platform.

Held to PyTorch's ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from ti_jax.ops.matmul import float32_product
from ti_jax.ops.platform import PLAIN, current

# XLA:CPU materialises whole score matrices, which do not fit the cache above about CPU_WHOLE_SCORES queries and keys.
# In chunks of CPU_QUERY_CHUNK queries, attention and its gradient took half the time at 1024 tokens, a quarter at 4096.
CPU_WHOLE_SCORES = 256
CPU_QUERY_CHUNK = 512

# From this many queries and keys on, moving the score matrices through a TPU's HBM costs more than the matmuls.
TPU_LONG = 1024
# Larger blocks read keys and values less often; 512 x 512 scores in float32 take 1 MB of a core's VMEM.
TPU_BLOCKS = (512, 256, 128)
TPU_LARGEST_HEAD = 256

# On an NVIDIA GPU, cuDNN's kernels are used from this many queries and keys on; below, the scores cost little. The 77
# keys of cross-attention are worth it: with scores in memory, SD1.5's step moved a seventh more bytes.
CUDA_LONG = 64
# cuDNN's kernels read rows of 16 bytes, and JAX has no gradient for odd lengths: others are padded to a multiple.
CUDA_MULTIPLE = 8
# The largest head dimension that cuDNN supports, forward and backward, by the GPU's compute capability. Other GPUs get
# XLA's attention. (JAX allows 256 on every GPU since Hopper; cuDNN's own table for Blackwell has 128.)
CUDA_LARGEST_HEAD = {8: 128, 9: 256, 10: 128, 12: 128}

# Without a kernel (float32, the VAE's single head of 512), more scores than this are computed in chunks of queries.
# 256 MB of float32: what a VAE has for four pictures of 512 pixels.
LARGEST_SCORES = 2**26


def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool = False, key_length: int | None = None
) -> jax.Array:
    """``softmax(query key^T / sqrt(D)) value`` for every head (Vaswani et al. 2017, equation 1).

    Scores and softmax are always float32, so ``upcast_attention`` of a UNet's config makes no difference.

    Args:
      query: [B, L, H, D].
      key, value: [B, S, H, D].
      causal: causal mask: query i attends to keys 0..i.
      key_length: the keys and values from this one on are padding (of `padded_for_cudnn`); None: there is none.

    Returns:
      [B, L, H, D], in the dtype of `value`.
    """
    platform = current()
    if platform.name == "cuda" and _suits_cudnn(query, key, platform.compute_capability):
        return cudnn_attention(query, key, value, causal, key_length)
    if key_length not in (None, key.shape[1]):
        key, value = key[:, :key_length], value[:, :key_length]
    if platform.name == "cpu":
        if causal or min(query.shape[1], key.shape[1]) <= CPU_WHOLE_SCORES:
            return _attention_in_matrices(query, key, value, causal)
        return _attention_in_chunks(query, key, value)
    if platform.name == "tpu" and not causal and _suits_flash_attention(query, key):
        return flash_attention(query, key, value)
    if platform != PLAIN and not causal and _scores(query, key) > LARGEST_SCORES:
        return _attention_in_bounded_chunks(query, key, value)
    return _attention(query, key, value, causal)


def _scores(query: jax.Array, key: jax.Array) -> int:
    """Number of scores: batch x heads x queries x keys."""
    return query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1]


def _suits_cudnn(query: jax.Array, key: jax.Array, compute_capability: int) -> bool:
    # JAX fails to trace these kernels on a machine without cuDNN, and for shapes or dtypes that they do not support.
    largest = CUDA_LARGEST_HEAD.get(compute_capability, 0)
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    long = min(query.shape[1], key.shape[1]) >= CUDA_LONG
    return half and long and query.shape[3] % 8 == 0 and query.shape[3] <= largest


def padded_for_cudnn(x: jax.Array) -> jax.Array:
    """`x` [B, L, C] with zeros after its L positions where cuDNN's kernels would have them padded; else `x` itself.

    Padded before the layers that make keys and values, for it is one kernel then and not several for each attention.
    """
    platform = current()
    padding = -x.shape[1] % CUDA_MULTIPLE
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    known = platform.name == "cuda" and platform.compute_capability in CUDA_LARGEST_HEAD
    if not (known and half and padding and x.shape[1] >= CUDA_LONG):
        return x
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0)))


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool = False, key_length: int | None = None
) -> jax.Array:
    """`dot_product_attention` by cuDNN's fused kernels, which never store a score matrix (Dao 2022, 2205.14135).

    For bfloat16 or float16, and a head dimension that is a multiple of 8. Lengths may be any: they are padded to a
    multiple of `CUDA_MULTIPLE`, and the kernels are given the true ones.
    """
    lengths = (query.shape[1], key.shape[1] if key_length is None else key_length)
    attend = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    if all(length % CUDA_MULTIPLE == 0 for length in (*lengths, key.shape[1])):
        return attend(query, key, value)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % CUDA_MULTIPLE), (0, 0), (0, 0))) for x in (query, key, value)
    )
    true = [jnp.full((query.shape[0],), length, jnp.int32) for length in lengths]
    attended = attend(query, key, value, query_seq_lengths=true[0], key_value_seq_lengths=true[1])
    return attended[:, : lengths[0]]


def _suits_flash_attention(query: jax.Array, key: jax.Array) -> bool:
    lengths = (query.shape[1], key.shape[1])
    divisible = all(length % TPU_BLOCKS[-1] == 0 for length in lengths)
    return min(lengths) >= TPU_LONG and divisible and query.shape[3] <= TPU_LARGEST_HEAD


def flash_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`dot_product_attention` by JAX's Pallas kernels for TPU, which never store a score matrix (Dao 2022, 2205.14135).

    For lengths that are multiples of 128. The kernels do not support `jax.shard_map`'s ``check_vma``.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as kernels  # needed on TPUs only

    block = next(size for size in TPU_BLOCKS if query.shape[1] % size == key.shape[1] % size == 0)
    sizes = {field.name: block for field in dataclasses.fields(kernels.BlockSizes)} | {"block_b": 1}
    by_head = (x.swapaxes(1, 2) for x in (query, key, value))
    scale = query.shape[3] ** -0.5
    attended = kernels.flash_attention(*by_head, sm_scale=scale, block_sizes=kernels.BlockSizes(**sizes))
    return attended.swapaxes(1, 2)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    scores = jnp.einsum("BLHD,BSHD->BHLS", query, key, preferred_element_type=jnp.float32)
    weights = _softmax(scores * query.shape[-1] ** -0.5, causal)
    return jnp.einsum("BHLS,BSHD->BLHD", weights.astype(value.dtype), value)


def _attention_in_bounded_chunks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`_attention` with at most `LARGEST_SCORES` scores at a time; the backward pass computes them again."""
    batch, length, heads, dim = query.shape
    chunks = min(length, -(-_scores(query, key) // LARGEST_SCORES))
    chunk = -(-length // chunks)
    chunks = -(-length // chunk)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))
    parts = padded.reshape(batch, chunks, chunk, heads, dim).swapaxes(0, 1)
    attend = jax.checkpoint(lambda part: _attention(part, key, value, causal=False))
    attended = jax.lax.map(attend, parts).swapaxes(0, 1)
    return attended.reshape(batch, chunks * chunk, heads, dim)[:, :length]


def _softmax(scores: jax.Array, causal: bool) -> jax.Array:
    """Softmax over the keys of scores [..., L, S], with a causal mask if asked."""
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1)


def _by_head(x: jax.Array) -> jax.Array:
    """[B, L, H, D] -> [B * H, L, D]"""
    return x.swapaxes(1, 2).reshape(x.shape[0] * x.shape[2], x.shape[1], x.shape[3])


def _from_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B * H, L, D] -> [B, L, H, D]"""
    return x.reshape(-1, heads, *x.shape[1:]).swapaxes(1, 2)


def _attention_in_matrices(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    """`_attention` with its gradient written out, for CPU; float32 inside, as XLA:CPU computes bfloat16 anyway.

    XLA:CPU fuses the softmax and its gradient into the matmuls that read them, and so recomputes them many times. With
    optimization barriers they are computed once, and a transformer block over 64 positions is almost twice as fast.
    """
    exact = (x.astype(jnp.float32) for x in (query, key, value))
    return _float32_attention(causal, *exact).astype(value.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float32_attention(causal: bool, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _float32_attention_forward(causal, query, key, value)[0]


def _float32_attention_forward(
    causal: bool, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    heads, scale = query.shape[2], query.shape[3] ** -0.5
    query, key, value = _by_head(query) * scale, _by_head(key), _by_head(value)
    weights = jax.lax.optimization_barrier(_softmax(query @ key.swapaxes(1, 2), causal))
    return _from_heads(weights @ value, heads), (query, key, value, weights)


def _float32_attention_backward(
    causal: bool, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    query, key, value, weights = kept  # the query is already scaled
    heads, scale = gradient.shape[2], gradient.shape[3] ** -0.5
    gradient = _by_head(gradient)
    to_value = weights.swapaxes(1, 2) @ gradient
    to_weights = gradient @ value.swapaxes(1, 2)
    to_scores = weights * (to_weights - jnp.sum(to_weights * weights, axis=-1, keepdims=True))
    to_scores = jax.lax.optimization_barrier(to_scores)
    to_query, to_key = to_scores @ key * scale, to_scores.swapaxes(1, 2) @ query
    return tuple(_from_heads(x, heads) for x in (to_query, to_key, to_value))


_float32_attention.defvjp(_float32_attention_forward, _float32_attention_backward)


def _attention_in_chunks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`_attention`, one head and one chunk of queries at a time; the backward pass recomputes each chunk's weights.

    Plain 2-D matmuls, because XLA:CPU is several times slower at matmuls with batch dimensions, even of size 1.
    """
    batch, length, heads, dim = query.shape
    chunks = -(-length // CPU_QUERY_CHUNK)
    chunk = -(-length // chunks)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))

    def attend_in_one_head(query_key_value: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, key, value = query_key_value
        return jax.lax.map(lambda part: _one_head(part, key, value), query.reshape(chunks, chunk, dim))

    attended = jax.lax.map(attend_in_one_head, (_by_head(padded), _by_head(key), _by_head(value)))
    return _from_heads(attended.reshape(batch * heads, -1, dim), heads)[:, :length]


@jax.custom_vjp
def _one_head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """[L, D], [S, D], [S, D] -> [L, D]"""
    return float32_product(_weights(query, key).astype(value.dtype), value, (1, 0)).astype(value.dtype)


def _weights(query: jax.Array, key: jax.Array) -> jax.Array:
    return jax.nn.softmax(float32_product(query, key, (1, 1)) * query.shape[-1] ** -0.5, axis=-1)


def _one_head_forward(
    query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _one_head(query, key, value), (query, key, value)


def _one_head_backward(
    kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = kept
    weights = _weights(query, key)
    to_value = _transposed_product(weights.astype(value.dtype), gradient)
    to_weights = float32_product(gradient, value, (1, 1))
    to_scores = weights * (to_weights - jnp.sum(to_weights * weights, axis=-1, keepdims=True))
    to_scores = (to_scores * query.shape[-1] ** -0.5).astype(query.dtype)
    to_query, to_key = float32_product(to_scores, key, (1, 0)), _transposed_product(to_scores, query)
    return to_query.astype(query.dtype), to_key.astype(key.dtype), to_value.astype(value.dtype)


_one_head.defvjp(_one_head_forward, _one_head_backward)


def _transposed_product(matrix: jax.Array, thin: jax.Array) -> jax.Array:
    """``matrix^T thin`` of [L, S] and [L, D], float32 [S, D].

    Computed as the transpose of ``thin^T matrix``: XLA:CPU takes ten times as long to read the large matrix by columns.
    The barrier stops XLA from folding the transpose into the matmul.
    """
    return jax.lax.optimization_barrier(float32_product(thin, matrix, (0, 0))).T
