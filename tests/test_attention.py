"""Attention is PyTorch's scaled_dot_product_attention, in one piece and in chunks."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops import tpu as kernels_for_tpu

from ti_jax.models.transformer import Attention
from ti_jax.ops import attention
from ti_jax.ops.attention import CPU_QUERY_CHUNK, cudnn_attention, dot_product_attention, flash_attention
from ti_jax.ops.platform import Platform, compiling_for

LONG = CPU_QUERY_CHUNK + 37  # in two chunks on CPU, the last not full


def queries_keys_values(length, key_length, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = ((2, length, 3, 8), (2, key_length, 3, 8), (2, key_length, 3, 8))
    return [scale * rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "key_length"), [(6, 6), (6, 4), (LONG, 7), (7, LONG), (LONG, LONG + 5), (260, 300)])
def test_output_and_gradients(length, key_length, causal):
    inputs = queries_keys_values(length, key_length)
    ours, pullback = jax.vjp(jax.jit(partial(dot_product_attention, causal=causal)), *inputs)
    # In double precision, so that the tolerance is for our rounding alone: gradients sum hundreds of terms here.
    tensors = [torch.from_numpy(array).double().requires_grad_() for array in inputs]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in tensors), is_causal=causal
    )
    theirs = theirs.transpose(1, 2)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-5)

    weights = np.random.default_rng(1).normal(size=ours.shape).astype(np.float32)
    theirs.backward(torch.from_numpy(weights))
    for gradient, tensor in zip(pullback(weights), tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("length", "key_length"), [(64, 77), (LONG, LONG), (1024, 1024)])
def test_output_and_gradients_in_bfloat16(length, key_length):
    """Held to the exact ones of the same rounded numbers; on a GPU the long ones are those of cuDNN's kernels."""
    inputs = [jnp.asarray(array, jnp.bfloat16) for array in queries_keys_values(length, key_length)]
    ours, pullback = jax.vjp(jax.jit(dot_product_attention), *inputs)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=ours.shape), jnp.bfloat16)
    tensors = [torch.from_numpy(np.asarray(array, np.float64)).requires_grad_() for array in inputs]
    theirs = torch.nn.functional.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in tensors))
    theirs = theirs.transpose(1, 2)
    theirs.backward(torch.from_numpy(np.asarray(weights, np.float64)))
    references = [theirs.detach(), *(tensor.grad for tensor in tensors)]
    for array, reference in zip((ours, *pullback(weights)), references, strict=True):
        assert array.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(array, np.float64) - reference.numpy())
        assert error < 2**-7 * np.linalg.norm(reference.numpy())


@pytest.mark.parametrize("length", [6, LONG])
def test_scores_are_float32(length):
    """Scores of some hundreds, whose differences bfloat16 would lose (what ``upcast_attention`` is about)."""
    inputs = [jnp.asarray(array, jnp.bfloat16) for array in queries_keys_values(length, length, scale=12.0)]
    attend = jax.jit(dot_product_attention)
    ours = attend(*inputs)
    exact = attend(*(array.astype(jnp.float32) for array in inputs))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=0, atol=2**-7 * np.abs(exact).max())


@pytest.mark.parametrize(("length", "chunked"), [(64, False), (LONG, True)])
def test_chunks_are_for_long_sequences_on_cpu(length, chunked):
    def in_loop(platform):
        gradient = jax.grad(lambda *inputs: jnp.sum(jnp.square(dot_product_attention(*inputs))), argnums=(0, 1, 2))
        with compiling_for(Platform(platform)):
            traced = jax.jit(gradient).trace(*queries_keys_values(length, length))
        return bool(re.search(r"stablehlo\.while", traced.lower(lowering_platforms=(platform,)).as_text()))

    assert in_loop("cpu") == chunked
    assert not in_loop("cuda")
    assert not in_loop("tpu")


@pytest.mark.parametrize(("length", "key_length"), [(1024, 1024), (1024, 1152)])
def test_the_kernels_for_tpu(length, key_length):
    """As a TPU would run them, interpreted."""
    inputs = [array[:1, :, :1] for array in queries_keys_values(length, key_length)]
    whole, pullback = jax.vjp(dot_product_attention, *inputs)
    with pltpu.force_tpu_interpret_mode():
        ours, our_pullback = jax.vjp(flash_attention, *map(jnp.asarray, inputs))
        weights = np.random.default_rng(1).normal(size=ours.shape).astype(np.float32)
        gradients = our_pullback(weights)
    np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients, pullback(weights), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "key_length", "causal", "kernels"),
    [(1024, 1024, False, 3), (4096, 4096, False, 3), (1024, 77, False, 0), (512, 512, False, 0), (1100, 1100, False, 0),
     (1024, 1024, True, 0)],
)  # fmt: skip
def test_kernels_are_for_long_self_attention_on_tpu(length, key_length, causal, kernels):
    """The forward pass has one of its own, the backward pass two."""

    def in_program(platform):
        attend = partial(dot_product_attention, causal=causal)
        gradient = jax.grad(lambda *inputs: jnp.sum(jnp.square(attend(*inputs))), argnums=(0, 1, 2))
        shapes = [jax.ShapeDtypeStruct((1, size, 2, 40), jnp.bfloat16) for size in (length, key_length, key_length)]
        with compiling_for(Platform(platform)):
            traced = jax.jit(gradient).trace(*shapes)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")

    assert in_program("tpu") == kernels
    assert in_program("cuda") == in_program("cpu") == 0


def program_of_gradient(platform, length, key_length, head, dtype, causal=False):
    """StableHLO of attention and its gradients."""
    attend = partial(dot_product_attention, causal=causal)
    gradient = jax.grad(lambda *inputs: jnp.sum(jnp.square(attend(*inputs))), argnums=(0, 1, 2))
    shapes = [jax.ShapeDtypeStruct((1, size, 2, head), dtype) for size in (length, key_length, key_length)]
    with compiling_for(platform):
        traced = jax.jit(gradient).trace(*shapes)
    return traced.lower(lowering_platforms=(platform.name,)).as_text()


@pytest.mark.parametrize(
    ("length", "key_length", "head", "dtype", "compute_capability", "kernels"),
    [(4096, 4096, 40, "bfloat16", 9, 2), (256, 256, 160, "bfloat16", 9, 2), (256, 256, 160, "bfloat16", 8, 0),
     (1024, 1024, 80, "bfloat16", 8, 2), (4096, 77, 40, "bfloat16", 9, 2), (64, 64, 160, "bfloat16", 9, 2),
     (63, 63, 40, "bfloat16", 9, 0), (64, 77, 160, "bfloat16", 8, 0), (4096, 77, 40, "float32", 9, 0),
     (4096, 4096, 40, "float32", 9, 0), (4096, 4096, 512, "bfloat16", 9, 0), (4096, 4096, 42, "bfloat16", 9, 0),
     (4096, 4096, 40, "bfloat16", 7, 0), (4096, 4096, 128, "bfloat16", 10, 2), (256, 256, 160, "bfloat16", 10, 0),
     (256, 256, 160, "bfloat16", 12, 0), (549, 549, 40, "bfloat16", 9, 2), (549, 77, 40, "float16", 9, 2),
     (4761, 4761, 40, "bfloat16", 8, 2), (4096, 4096, 40, "bfloat16", 99, 0)],
)  # fmt: skip
def test_kernels_of_cudnn_are_for_attention_in_half_precision(
    length, key_length, head, dtype, compute_capability, kernels, asked_of_a_gpu
):
    """One forward, one backward; lengths that are odd or no multiple of 8 are padded."""
    asked_of_a_gpu(compute_capability)
    text = program_of_gradient(Platform("cuda", compute_capability), length, key_length, head, dtype)
    assert len(re.findall(r"custom_call.*__cudnn\$fmha", text)) == kernels
    assert "__cudnn$fmha" not in program_of_gradient(Platform("cpu"), length, key_length, head, dtype)


def test_kernels_of_cudnn_have_a_causal_mask(asked_of_a_gpu):
    """The text encoder's attention: 77 positions, padded."""
    asked_of_a_gpu(9)
    text = program_of_gradient(Platform("cuda", 9), 77, 77, 64, "bfloat16", causal=True)
    masks = re.findall(r"mask_type[^A-Z]*([A-Z_]+)", text)
    assert masks == ["PADDING_CAUSAL"] * 2
    whole = program_of_gradient(Platform("cuda", 9), 80, 80, 64, "bfloat16", causal=True)
    assert re.findall(r"mask_type[^A-Z]*([A-Z_]+)", whole) == ["CAUSAL"] * 2


@pytest.mark.parametrize(("length", "key_length", "causal"), [(64, 77, False), (69, 69, False), (77, 77, True)])
def test_padding_for_cudnn_changes_nothing(length, key_length, causal, monkeypatch):
    """With XLA's attention for the same padded call: outputs and gradients are those without padding."""
    inputs = queries_keys_values(length, key_length)
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k))
    ours, pullback = jax.vjp(jax.jit(partial(cudnn_attention, causal=causal)), *map(jnp.asarray, inputs))
    expected, their_pullback = jax.vjp(jax.jit(partial(dot_product_attention, causal=causal)), *inputs)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    weights = np.random.default_rng(1).normal(size=ours.shape).astype(np.float32)
    for gradient, reference in zip(pullback(weights), their_pullback(weights), strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("platform", [Platform("cuda", 9), Platform("cuda", 7), Platform("cpu")])
def test_a_text_is_padded_before_keys_and_values_are_made_of_it(platform, asked_of_a_gpu):
    """And so neither keys nor values nor their gradients are, each by a kernel; without cuDNN nothing is."""
    asked_of_a_gpu(9)
    layer = Attention(2, jnp.bfloat16)
    shapes = [jax.ShapeDtypeStruct((2, length, 64), jnp.bfloat16) for length in (256, 77)]
    variables = jax.eval_shape(layer.init, jax.random.key(0), *shapes)
    gradient = jax.grad(lambda *inputs: jnp.sum(jnp.square(layer.apply(*inputs))), argnums=(1, 2))
    with compiling_for(platform):
        text = jax.jit(gradient).trace(variables, *shapes).lower(lowering_platforms=(platform.name,)).as_text()
    kernels = platform == Platform("cuda", 9)
    assert len(re.findall(r"custom_call.*__cudnn\$fmha", text)) == 2 * kernels
    assert text.count("high = [0, 3, 0]") == kernels  # the text [B, L, C]
    assert text.count("high = [0, 3, 0, 0]") == 0  # keys and values [B, L, H, D]


def test_padding_of_keys_is_never_seen():
    """Whatever it holds; as on a GPU without a kernel for the head."""
    query, key, value = queries_keys_values(9, 80)
    expected = dot_product_attention(query, key[:, :77], value[:, :77])
    np.testing.assert_array_equal(dot_product_attention(query, key, value, key_length=77), expected)
    plain = jax.nn.dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k))
        ours = cudnn_attention(*map(jnp.asarray, (query, key, value)), key_length=77)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
def test_without_a_kernel_large_attention_is_in_chunks(platform, monkeypatch):
    """Memory is bounded by `LARGEST_SCORES`; outputs and gradients are those of one piece."""
    monkeypatch.setattr(attention, "LARGEST_SCORES", 2 * 3 * 40 * 77)
    assert "stablehlo.while" in program_of_gradient(Platform(platform), 300, 77, 8, "float32")
    assert "stablehlo.while" not in program_of_gradient(Platform(platform), 60, 77, 8, "float32")
    inputs = queries_keys_values(300, 77)
    expected, their_pullback = jax.vjp(jax.jit(partial(dot_product_attention)), *inputs)
    with compiling_for(Platform(platform)):
        # Another function, or it would be the program above.
        ours, pullback = jax.vjp(jax.jit(partial(dot_product_attention)), *map(jnp.asarray, inputs))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    weights = np.random.default_rng(1).normal(size=ours.shape).astype(np.float32)
    for gradient, reference in zip(pullback(weights), their_pullback(weights), strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-5)


def test_only_a_tpu_imports_its_kernels(monkeypatch):
    """They are in `jax.experimental`: the day that they move, nobody else shall notice."""
    monkeypatch.delattr(kernels_for_tpu, "flash_attention", raising=False)
    monkeypatch.setitem(sys.modules, f"{kernels_for_tpu.__name__}.flash_attention", None)
    shape = jax.ShapeDtypeStruct((1, 1024, 2, 40), jnp.float32)
    for platform in ("cpu", "cuda", "rocm", "plain"):
        with compiling_for(Platform(platform, 9)):
            assert jax.eval_shape(lambda *inputs: dot_product_attention(*inputs), shape, shape, shape) == shape
    with compiling_for(Platform("tpu")), pytest.raises(ImportError):
        jax.eval_shape(lambda *inputs: dot_product_attention(*inputs), shape, shape, shape)


def test_chunks_never_hold_all_scores():
    inputs = queries_keys_values(1024, 1024)
    gradient = jax.grad(lambda *inputs: jnp.sum(jnp.square(dot_product_attention(*inputs))), argnums=(0, 1, 2))
    all_scores = 2 * 3 * 1024 * 1024 * 4  # bytes
    assert jax.jit(gradient).lower(*inputs).compile().memory_analysis().temp_size_in_bytes < all_scores
