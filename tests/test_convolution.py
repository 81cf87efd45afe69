"""Every form of the convolution is PyTorch's conv2d, with its gradients; each platform gets the form meant for it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ti_jax.ops import convolution
from ti_jax.ops.convolution import conv2d
from ti_jax.ops.platform import Platform, compiling_for

SAME = ((1, 1), (1, 1))
END = ((0, 1), (0, 1))
NONE = ((0, 0), (0, 0))

# x [B, H, W, C], output channels, kernel size, stride, padding. The third, fourth and sixth are such that the kernel
# outweighs the picture.
CASES = [
    ((2, 8, 6, 5), 7, 3, 1, SAME),
    ((2, 5, 7, 6), 4, 3, 1, SAME),
    ((2, 2, 2, 96), 97, 3, 1, SAME),
    ((1, 1, 3, 90), 80, 3, 1, SAME),
    ((2, 7, 8, 5), 6, 3, 2, SAME),
    ((2, 3, 4, 80), 90, 3, 2, END),
    ((2, 8, 5, 4), 6, 3, 2, END),
    ((2, 4, 3, 5), 6, 1, 1, NONE),
    ((2, 6, 6, 3), 4, 5, 1, ((2, 1), (0, 2))),
]


def arrays(x_shape, channels, size):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(size, size, x_shape[-1], channels)) / np.sqrt(size * size * x_shape[-1])
    return rng.normal(size=x_shape).astype(np.float32), kernel.astype(np.float32)


def torch_conv(x, kernel, stride, padding):
    (top, bottom), (left, right) = padding
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    return torch.nn.functional.conv2d(padded, kernel.permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("x_shape", "channels", "size", "stride", "padding"), CASES)
def test_output_and_gradients(x_shape, channels, size, stride, padding):
    x, kernel = arrays(x_shape, channels, size)
    ours, pullback = jax.vjp(jax.jit(lambda x, kernel: conv2d(x, kernel, stride, padding)), x, kernel)
    torch_x, torch_kernel = (torch.from_numpy(array).requires_grad_() for array in (x, kernel))
    theirs = torch_conv(torch_x, torch_kernel, stride, padding)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-5)

    weights = np.random.default_rng(1).normal(size=ours.shape).astype(np.float32)
    theirs.backward(torch.from_numpy(weights))
    for gradient, reference in zip(pullback(weights), (torch_x.grad, torch_kernel.grad), strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5 * reference.abs().max())


@pytest.mark.parametrize(("x_shape", "channels", "size", "stride", "padding"), CASES)
def test_the_forms_of_cpu_and_of_elsewhere_agree(x_shape, channels, size, stride, padding):
    x, kernel = arrays(x_shape, channels, size)
    np.testing.assert_allclose(
        jax.jit(partial(convolution._im2col, stride, padding))(x, kernel),
        jax.jit(partial(convolution._convolution, stride, padding))(x, kernel),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(("x_shape", "channels", "size", "stride", "padding"), CASES)
def test_by_taps(x_shape, channels, size, stride, padding):
    """The form for bfloat16 on CPU, in float32, so that nothing is hidden by rounding."""
    x, kernel = arrays(x_shape, channels, size)
    exact, transpose = jax.vjp(jax.jit(lambda x: convolution._convolution(stride, padding, x, kernel)), x)
    by_taps = jax.jit(partial(convolution._by_taps, stride, padding))
    np.testing.assert_allclose(by_taps(x, kernel), exact, rtol=1e-5, atol=1e-5)
    gradient = np.random.default_rng(1).normal(size=exact.shape).astype(np.float32)
    gradient_by_taps = jax.jit(partial(convolution._gradient_by_taps, stride, padding, x_shape))
    np.testing.assert_allclose(
        gradient_by_taps(gradient, kernel),
        transpose(gradient)[0],
        rtol=1e-5,
        atol=1e-5,
    )


def lowered(function, platform, *args):
    """Names of the operations that `function` becomes on `platform`, whichever machine asks."""
    with compiling_for(Platform(platform)):
        text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(r"stablehlo\.(convolution|dot_general)", text))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_each_platform_gets_its_form(platform):
    def input_gradient(stride, x, kernel):
        return jax.grad(lambda x: conv2d(x, kernel, stride, SAME).sum())(x)

    on_cpu = platform == "cpu"
    picture, small_kernel = arrays((1, 8, 8, 4), 4, 3)
    small_picture, kernel = arrays((1, 2, 2, 96), 96, 3)

    def forward(x, kernel):
        return conv2d(x, kernel, 1, SAME)

    assert lowered(forward, platform, picture, small_kernel) == {"convolution"}
    assert lowered(forward, platform, small_picture, kernel) == {"dot_general" if on_cpu else "convolution"}
    assert lowered(partial(input_gradient, 1), platform, picture, small_kernel) == {"convolution"}
    strided = lowered(partial(input_gradient, 2), platform, picture, small_kernel)
    assert ("dot_general" in strided) == on_cpu
    in_half = [jnp.asarray(array, jnp.bfloat16) for array in arrays((1, 8, 8, 40), 40, 3)]
    for function in (forward, partial(input_gradient, 1), partial(input_gradient, 2)):
        assert ("convolution" not in lowered(function, platform, *in_half)) == on_cpu


def test_a_loop_of_gradients_on_cpu():
    """In a loop as outside: the derivative rule is the same under every transformation."""
    x, kernel = arrays((2, 8, 8, 4), 4, 3)

    @jax.jit
    def descend(x):
        return x - 0.1 * jax.grad(lambda x: jnp.sum(jnp.square(conv2d(x, kernel, 1, SAME))))(x)

    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: descend(x), x))(x)
    expected = x
    for _ in range(3):
        expected = descend(expected)
    np.testing.assert_allclose(looped, expected, rtol=1e-5, atol=1e-5)
    mapped = jax.jit(jax.vmap(lambda x: conv2d(x[None], kernel, 1, SAME)[0]))(x)
    whole = jax.jit(lambda x: conv2d(x, kernel, 1, SAME))(x)
    np.testing.assert_allclose(mapped, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x_shape", "channels", "size", "stride", "padding"),
    [((2, 2, 2, 96), 97, 3, 1, SAME), ((2, 6, 4, 8), 5, 3, 1, SAME), ((2, 7, 8, 40), 33, 3, 2, END)],
)
def test_bfloat16(x_shape, channels, size, stride, padding):
    x, kernel = (jnp.asarray(array, jnp.bfloat16) for array in arrays(x_shape, channels, size))
    exact_arrays = [array.astype(jnp.float32) for array in (x, kernel)]
    convolve = jax.jit(lambda x, kernel: conv2d(x, kernel, stride, padding))
    ours, pullback = jax.vjp(convolve, x, kernel)
    exact, exact_pullback = jax.vjp(convolve, *exact_arrays)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=2**-8)
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=ours.shape), jnp.bfloat16)
    exact_gradients = exact_pullback(gradient.astype(jnp.float32))
    for rounded, exact in zip(pullback(gradient), exact_gradients, strict=True):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=2**-8, atol=2**-8 * jnp.abs(exact).max())
