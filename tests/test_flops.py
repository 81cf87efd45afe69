"""Counting the least work: a product once forward, and once backward for each factor that the gradient goes through."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ti_jax.ops.attention import dot_product_attention
from ti_jax.ops.platform import PLAIN, Platform, compiling_for
from ti_jax.training.flops import least_flops

X, W = jnp.ones((4, 8)), jnp.ones((8, 16))
PRODUCT = 2 * 4 * 8 * 16


def flops(function, *arguments, trained):
    return least_flops(jax.make_jaxpr(function)(*arguments), trained)


@pytest.mark.parametrize(
    ("trained", "times"), [([False, False], 1), ([True, False], 2), ([False, True], 2), ([True, True], 3)]
)
def test_a_product(trained, times):
    assert flops(jnp.matmul, X, W, trained=trained) == times * PRODUCT


def test_what_comes_before_the_trained_argument_goes_forward_only():
    second = jnp.ones((16, 2))
    assert flops(lambda x, w, row: (x @ w + row) @ second, X, W, jnp.ones(16), trained=[False, False, True]) == (
        PRODUCT + 2 * (2 * 4 * 16 * 2)
    )


def test_functions_within_functions():
    inner = jax.checkpoint(jax.jit(lambda x: jnp.tanh(x @ W)))
    assert flops(inner, X, trained=[True]) == 2 * PRODUCT

    @jax.custom_vjp
    def custom(x):
        return x @ W

    custom.defvjp(lambda x: (custom(x), None), lambda kept, gradient: (gradient @ W.T,))
    assert flops(custom, X, trained=[True]) == 2 * PRODUCT


def test_of_several_ways_the_one_with_the_least_work_counts():
    small = W[:, :4]
    assert flops(
        lambda x, which: lax.cond(which, lambda x: jnp.sum(x @ W), lambda x: jnp.sum(x @ small), x),
        X, True, trained=[True, False],
    ) == 2 * PRODUCT / 4  # fmt: skip


@pytest.mark.parametrize(("platform", "counted"), [(PLAIN, True), (Platform("tpu"), False)])
def test_a_kernel_does_not_say_how_much_it_computes(platform, counted):
    """Attention of 1024 places is kernels on a TPU; the plain form is two products."""
    inputs = [jnp.ones((1, 1024, 2, 8))] * 3
    with compiling_for(platform):
        # A function of its own, or JAX would remember what it has traced for another platform.
        found = flops(lambda *inputs: dot_product_attention(*inputs), *inputs, trained=[True] * 3)
    assert found == (2 * 3 * (2 * 2 * 1024 * 1024 * 8) if counted else math.inf)


def test_a_loop_carries_the_influence_from_turn_to_turn():
    square = jnp.ones((8, 8))

    def looped(x, row):
        # The first turn multiplies x before the row is in it; what can be touched counts as touched.
        return lax.scan(lambda carry, _: (carry @ square + row, None), x, length=5)[0]

    assert flops(looped, X, jnp.ones(8), trained=[False, True]) == 2 * 5 * (2 * 4 * 8 * 8)


def test_a_convolution():
    picture, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))

    def convolve(x, w, stride=1, padding=((1, 1), (1, 1))):
        return lax.conv_general_dilated(x, w, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    # Along a side four places have three neighbours in the picture, and two have two.
    assert flops(convolve, picture, kernel, trained=[True, False]) == 2 * 2 * 2 * (4 * 3 + 2 * 2) ** 2 * 3 * 5
    # Of three, the first has no neighbour to the left.
    strided = partial(convolve, stride=2)
    assert flops(strided, picture, kernel, trained=[False, False]) == 2 * 2 * (2 + 3 + 3) ** 2 * 3 * 5
