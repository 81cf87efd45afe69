"""Products in bfloat16 are exact up to one rounding, with their gradients, in the form that a CPU runs fast."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ti_jax.models.layers import Dense
from ti_jax.ops.matmul import dot_general, matmul
from ti_jax.ops.platform import Platform, compiling_for

ONE_ROUNDING = 2**-8


def arrays(dtype, inputs=48, outputs=5):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 7, inputs), (inputs, outputs)))


@pytest.mark.parametrize(("inputs", "outputs"), [(48, 5), (5, 48)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_and_gradients(dtype, inputs, outputs):
    """In one program, as a step is: there XLA moves transposes into products, and might have none for the result."""
    x, kernel = arrays(dtype, inputs, outputs)
    ours, pullback = jax.vjp(jax.jit(matmul), x, kernel)
    exact_x, exact_kernel = (array.astype(jnp.float32) for array in (x, kernel))
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=ours.shape), dtype)
    exact_gradient = gradient.astype(jnp.float32)
    to_x, to_kernel = pullback(gradient)
    tolerance = 1e-6 if dtype == jnp.float32 else ONE_ROUNDING
    for array, exact in (
        (ours, exact_x @ exact_kernel),
        (to_x, exact_gradient @ exact_kernel.T),
        (to_kernel, jnp.einsum("bli,blo->io", exact_x, exact_gradient)),
    ):
        assert array.dtype == dtype
        np.testing.assert_allclose(array.astype(jnp.float32), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_on_cpu_every_product_has_float32_results(platform):
    """Only then does XLA use the CPU's bfloat16 instructions. Elsewhere a result is rounded within the product."""

    def loss(x, kernel):
        with compiling_for(Platform(platform)):
            return jnp.sum(matmul(x, kernel).astype(jnp.float32) ** 2)

    text = (
        jax.jit(jax.value_and_grad(loss)).trace(*arrays(jnp.bfloat16)).lower(lowering_platforms=(platform,)).as_text()
    )
    results = re.findall(r"dot_general.*tensor<[\dx]*xbf16>, tensor<[\dx]*xbf16>\) -> tensor<[\dx]*x(\w+)>", text)
    assert len(results) >= 2 and (set(results) == {"f32"}) == (platform == "cpu")


def test_only_the_products_of_a_dense_layer_are_taken():
    x, kernel = arrays(jnp.float32)
    np.testing.assert_array_equal(dot_general(x, kernel, (((2,), (0,)), ((), ()))), matmul(x, kernel))
    for dimensions, precision in (((((1,), (0,)), ((), ())), None), ((((2,), (0,)), ((), ())), "highest")):
        with pytest.raises(ValueError, match="is not x @ kernel"):
            dot_general(x, kernel, dimensions, precision)


def test_a_dense_layer_in_bfloat16():
    x, kernel = arrays(jnp.float32)
    layer = Dense(5, dtype=jnp.bfloat16)
    variables = {"params": {"kernel": kernel, "bias": jnp.ones(5)}}
    ours = layer.apply(variables, x)
    exact = x.astype(jnp.bfloat16).astype(jnp.float32) @ kernel.astype(jnp.bfloat16).astype(jnp.float32) + 1
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2 * ONE_ROUNDING, atol=2 * ONE_ROUNDING)
