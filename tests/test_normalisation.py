"""Group norm and its kernels for NVIDIA GPUs, which run interpreted here."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P

from ti_jax.models.layers import ResnetBlock2D
from ti_jax.ops import group_norm_kernels as kernels
from ti_jax.ops.normalisation import SWITCH, group_norm
from ti_jax.ops.platform import PLAIN, Platform, compiling_for
from ti_jax.training.parallel import AXIS, make_mesh

HOPPER = Platform("cuda", 9)

# Shape [B, P, C], groups, and the largest group that is one block: of odd sizes; of two blocks of rows; of tiles of 32.
WHOLE, BLOCKS, TILES = ((2, 9, 12), 4, kernels.WHOLE), ((2, 32, 64), 4, 0), ((1, 16, 96), 3, 0)
CASES = [WHOLE, BLOCKS, TILES]


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as a GPU would be given them, in Pallas' interpreter."""
    monkeypatch.setattr(kernels, "can_lower", lambda: True)
    monkeypatch.setattr(kernels, "Norm", partial(kernels.Norm, interpret=True))

    def with_groups_up_to(whole):
        monkeypatch.setattr(kernels, "WHOLE", whole)
        monkeypatch.setattr(kernels, "MOST_ROWS", 16)

    return with_groups_up_to


def arrays(shape, mean=0.0):
    """x, shift, scale, bias, and weights of the result and of what goes beside it."""
    rng = np.random.default_rng(0)
    channels = [rng.normal(size=size) for size in ((shape[0], shape[-1]), shape[-1], shape[-1])]
    pictures = [rng.normal(size=shape) + mean, rng.normal(size=shape), rng.normal(size=shape)]
    return [array.astype(np.float32) for array in (pictures[0], *channels, *pictures[1:])]


def by_kernels(num_groups, silu, dtype, x, shift, scale, bias):
    return kernels.normalise(kernels.Norm(num_groups, 1e-5, silu, dtype), x, shift, scale, bias)


def of_torch(num_groups, silu, x, shift, scale, bias, weights, beside, dtype):
    """PyTorch's result and gradients with respect to x, shift, scale and bias; float64 NumPy."""
    leaves = [torch.from_numpy(array).to(dtype).requires_grad_() for array in (x, shift, scale, bias)]
    shifted = (leaves[0] + leaves[1][:, None]).movedim(-1, 1)
    normed = torch.nn.functional.group_norm(shifted, num_groups, leaves[2], leaves[3], 1e-5).movedim(1, -1)
    normed = torch.nn.functional.silu(normed) if silu else normed
    torch.autograd.backward(
        (normed, leaves[0]), (torch.from_numpy(weights).to(dtype), torch.from_numpy(beside).to(dtype))
    )
    return [tensor.detach().double().numpy() for tensor in (normed, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize(("shape", "num_groups", "whole"), CASES)
@pytest.mark.parametrize(("mean", "silu"), [(0.0, True), (10.0, False)])
def test_the_kernels_and_their_gradients(shape, num_groups, whole, mean, silu, interpreted):
    """Held to PyTorch in float64, and to XLA's form: with a mean far from zero, too."""
    interpreted(whole)
    *inputs, weights, beside = arrays(shape, mean)
    (ours, x), pullback = jax.vjp(partial(by_kernels, num_groups, silu, jnp.float32), *inputs)
    np.testing.assert_array_equal(x, inputs[0])
    expected = of_torch(num_groups, silu, *inputs, weights, beside, torch.float64)
    for our, their in zip((ours, *pullback((weights, beside))), expected, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-5 * max(1.0, np.abs(their).max()))

    form = partial(group_norm, num_groups=num_groups, epsilon=1e-5, silu=silu)
    of_xla = jax.vjp(lambda x, shift, scale, bias: form(x, scale, bias, shift=shift), *inputs)
    np.testing.assert_allclose(ours, of_xla[0][0], rtol=0, atol=1e-5 * np.abs(ours).max())
    for our, their in zip(pullback((weights, beside)), of_xla[1]((weights, beside)), strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-5 * max(1.0, np.abs(their).max()))


@pytest.mark.parametrize(("shape", "num_groups", "whole"), [WHOLE, BLOCKS])
def test_in_bfloat16_the_kernels_are_as_exact_as_pytorch(shape, num_groups, whole, interpreted):
    interpreted(whole)
    given = [torch.from_numpy(array).bfloat16().float().numpy() for array in arrays(shape)]
    exact = of_torch(num_groups, True, *given, torch.float64)
    theirs = of_torch(num_groups, True, *given, torch.bfloat16)
    *inputs, weights, beside = (jnp.asarray(array, jnp.bfloat16) for array in given)
    (normed, _), pullback = jax.vjp(partial(by_kernels, num_groups, True, jnp.bfloat16), *inputs)
    for our, their, truth in zip((normed, *pullback((weights, beside))), theirs, exact, strict=True):
        assert our.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(our, np.float64) - truth)
        assert error <= np.linalg.norm(their - truth)


@pytest.mark.parametrize("whole", [kernels.WHOLE, 0])
def test_what_no_gradient_comes_by_is_not_added(whole, interpreted):
    """Without a shift, and with a gradient by one of the two results only."""
    interpreted(whole)
    (shape, num_groups, _) = BLOCKS
    x, shift, scale, bias, weights, beside = arrays(shape)
    none = np.zeros_like(shift)

    def gradients(shift, normed, residual):
        def weighed(x):
            results = by_kernels(num_groups, True, jnp.float32, x, shift, scale, bias)
            parts = [jnp.sum(result * weight) for result, weight in zip(results, (weights, beside), strict=True)]
            return normed * parts[0] + residual * parts[1] if normed and residual else parts[residual]

        return jax.grad(weighed)(x)

    both = gradients(none, True, True)
    np.testing.assert_allclose(gradients(None, True, True), both, rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradients(None, True, False) + beside, both, rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradients(None, False, True), beside, rtol=0, atol=1e-6)


def test_a_residual_block_by_kernels_is_that_of_xla(interpreted):
    """In bfloat16, with its gradients: what differs is rounding. Time shifts, the shortcut goes beside."""
    interpreted(0)
    block = ResnetBlock2D(64, 32, 1e-5, jnp.bfloat16)
    rng = np.random.default_rng(0)
    x, time = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((2, 4, 8, 64), (2, 8)))
    variables = block.init(jax.random.key(0), x, time)

    def on(platform):
        def weighed(x):
            return jnp.sum(jnp.square(block.apply(variables, x, time).astype(jnp.float32)))

        with compiling_for(platform):
            text = str(jax.make_jaxpr(jax.grad(weighed))(x))
            return text.count("pallas_call["), jax.grad(weighed)(x).astype(jnp.float32)

    assert on(PLAIN)[0] == 0
    calls, ours = on(HOPPER)
    assert calls == 2 * (3 + 3)
    error = np.linalg.norm(ours - on(PLAIN)[1]) / np.linalg.norm(ours)
    assert 0 < error < 2**-7


def test_the_kernels_within_a_mapped_step(interpreted):
    """As `make_run_steps` maps: 8 devices compute what one does."""
    interpreted(0)
    x, _, scale, bias, weights, _ = arrays((8, 16, 32))

    def step(x, weights):
        with compiling_for(HOPPER):
            return jax.grad(lambda x: jnp.sum(group_norm(x, scale, bias, 2, 1e-5, True)[0] * weights))(x)

    given = [jnp.asarray(array, jnp.bfloat16) for array in (x, weights)]
    mapped = jax.shard_map(step, mesh=make_mesh(), in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    np.testing.assert_array_equal(jax.jit(mapped)(*given), jax.jit(step)(*given))


@pytest.mark.parametrize(
    ("shape", "num_groups", "kernel_count"),
    [((8, 64, 1280), 32, 2), ((8, 256, 1920), 32, 2), ((8, 256, 2560), 32, 6), ((8, 1024, 640), 32, 6),
     ((8, 4096, 320), 32, 6), ((8, 4096, 960), 32, 6), ((2, 4761, 320), 32, 0), ((2, 81, 1280), 32, 2),
     ((1, 2**18, 128), 32, 6), ((1, 2**22, 128), 32, 0), ((2**13, 2**11, 128), 32, 0), ((2, 1024, 33), 3, 2),
     ((2, 4096, 48), 4, 0)],
)  # fmt: skip
def test_which_pictures_the_kernels_take(shape, num_groups, kernel_count, interpreted):
    """SD1.5's; of 552 pixels, whose 69 x 69 latents have no blocks; the VAE's; too large; odd numbers of channels."""

    def program(platform, dtype=jnp.bfloat16):
        channels = jax.ShapeDtypeStruct(shape[-1:], dtype)

        def weighed(x, scale, bias):
            return jnp.sum(group_norm(x, scale, bias, num_groups, 1e-5)[0])

        with compiling_for(platform):
            return str(jax.make_jaxpr(jax.grad(weighed))(jax.ShapeDtypeStruct(shape, dtype), channels, channels))

    assert program(HOPPER).count("pallas_call[") == kernel_count
    for platform in (Platform("cpu"), Platform("tpu"), Platform("rocm"), Platform("cuda", 7), PLAIN):
        assert "pallas_call" not in program(platform)
    assert "pallas_call" not in program(HOPPER, jnp.float32)


def traced(shape=(2, 64, 64)):
    channels = jax.ShapeDtypeStruct(shape[-1:], jnp.bfloat16)
    with compiling_for(HOPPER):
        norm = jax.jit(lambda *inputs: group_norm(*inputs, 32, 1e-5, True)[0])
        return norm.trace(jax.ShapeDtypeStruct(shape, jnp.bfloat16), channels, channels)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_they_lower_to_triton(monkeypatch):
    if hasattr(triton, "get_gpu_info"):
        from jax._src.pallas.triton import gpu_info

        hopper = gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H100)
        monkeypatch.setattr(triton, "get_gpu_info", lambda: hopper)
        monkeypatch.setattr(gpu_info, "get_gpu_info", lambda: hopper)
    text = traced().lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1


def test_without_the_kernels_xla_takes_over(interpreted, monkeypatch):
    """By the switch; by a JAX that does not know what it lowers for; by one that has dropped them."""
    assert "pallas_call" in str(traced().jaxpr)
    with monkeypatch.context() as patch:
        patch.setenv(SWITCH, "0")
        assert "pallas_call" not in str(traced().jaxpr)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "can_lower", lambda: False)
        assert "pallas_call" not in str(traced().jaxpr)
    monkeypatch.setitem(sys.modules, "ti_jax.ops.group_norm_kernels", None)
    monkeypatch.delattr("ti_jax.ops.group_norm_kernels")
    assert "pallas_call" not in str(traced().jaxpr)


def test_no_gpu_no_kernels(monkeypatch):
    def no_gpu():
        raise ValueError("Unsupported GPU device kind: cpu")

    monkeypatch.setattr(triton, "get_gpu_info", no_gpu, raising=False)
    assert not kernels.can_lower()
    monkeypatch.delattr(triton, "get_gpu_info")
    assert kernels.can_lower()
