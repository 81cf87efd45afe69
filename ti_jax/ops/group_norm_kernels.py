"""Group normalisation with its SiLU in few passes over a picture, for NVIDIA GPUs: Pallas kernels by way of Triton.

XLA:GPU stores the deviation from the mean, and the gradients before and after SiLU, as float32 pictures. These kernels
read and write pictures in the dtype that they come in, compute in float32, and keep nothing for the gradient but their
input and two numbers for each group.

Where a group fits into one block (`WHOLE`), one kernel does all, forward and backward. A larger picture is cut into
blocks of rows (pixels) and channels: one kernel sums within blocks, a small one combines the sums for each group, and a
third computes the result from a second reading. Nothing depends on the order in which blocks finish, so results repeat
to the bit.

JAX 0.12 calls this backend of Pallas deprecated, in favour of one for Hopper and later GPUs only. Where it is gone,
`ti_jax.ops.normalisation` uses XLA's form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

# Numbers in a block that is a whole group: the backward pass has two of each in registers, of which an SM has 65536.
WHOLE = 16384
# A block of a larger picture: 128 bytes of a row in bfloat16, and enough rows to be worth a program.
MOST_ROWS, LEAST_ROWS = 128, 16
TILES = (64, 32)
# Triton's offsets are int32.
MOST_NUMBERS = 2**31 - 1
# Partial sums that one program combines for a group.
MOST_SUMS = 32768


@dataclass(frozen=True)
class Norm:
    """What is fixed when a norm is compiled.

    Attributes:
      num_groups, epsilon, silu: as in `ti_jax.ops.normalisation.group_norm`.
      dtype: of the result.
      interpret: run the kernels by Pallas' interpreter, on any device: for tests.
    """

    num_groups: int
    epsilon: float
    silu: bool
    dtype: Any
    interpret: bool = False


def suits(shape: tuple[int, ...], num_groups: int) -> bool:
    """Whether the kernels can normalise pictures of shape [B, P, C]."""
    return math.prod(shape) <= MOST_NUMBERS and (_is_whole(shape, num_groups) or _suits_blocks(shape, num_groups))


def can_lower() -> bool:
    """Whether JAX can lower the kernels. Since 0.12 it asks a GPU, or the abstract device of a mesh, what it is."""
    ask = getattr(plt, "get_gpu_info", None)
    try:
        return ask is None or ask() is not None
    except ValueError:
        return False


def _is_whole(shape: tuple[int, ...], num_groups: int) -> bool:
    _, pixels, channels = shape
    return _padded(pixels) * _padded(channels // num_groups) <= WHOLE


def _suits_blocks(shape: tuple[int, ...], num_groups: int) -> bool:
    _, pixels, channels = shape
    rows = _rows(pixels)
    few_sums = _padded(pixels // rows) * _padded(channels // num_groups) <= MOST_SUMS
    return rows >= LEAST_ROWS and channels % TILES[-1] == 0 and few_sums


def _padded(size: int) -> int:
    """The next power of two: Triton's blocks have no other sizes."""
    return int(pl.next_power_of_2(size))


def _rows(pixels: int) -> int:
    """Rows of a block: a power of two that divides the pixels."""
    return math.gcd(pixels, MOST_ROWS)


def _tile(channels: int) -> int:
    return next(tile for tile in TILES if channels % tile == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(
    norm: Norm, x: jax.Array, shift: jax.Array | None, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Group norm of ``x + shift``, then SiLU if asked; and `x`.

    Args:
      x: [B, P, C] with a shape that `suits`. shift: [B, C] or None. scale, bias: [C].

    Returns:
      [B, P, C] in the dtype of `norm`, and `x` for a residual connection: the gradient that comes back by it is added
      within the kernel.
    """
    if _is_whole(x.shape, norm.num_groups):
        normed, *_ = _whole_forward(norm, x, shift, scale, bias)
    else:
        normed = _apply(norm, x, shift, scale, bias, *_moments(norm, x, shift))
    return normed, x


def _forward(
    norm: Norm, x: Any, shift: Any, scale: Any, bias: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    x, shift, scale, bias = (None if primal is None else primal.value for primal in (x, shift, scale, bias))
    if _is_whole(x.shape, norm.num_groups):
        normed, mean, rstd = _whole_forward(norm, x, shift, scale, bias)
    else:
        mean, rstd = _moments(norm, x, shift)
        normed = _apply(norm, x, shift, scale, bias, mean, rstd)
    return (normed, x), (x, shift, scale, bias, mean, rstd)


def _backward(norm: Norm, kept: tuple[Any, ...], gradients: tuple[Any, Any]) -> tuple[Any, ...]:
    x, shift, scale, bias, *_ = kept
    gradient, beside = (None if isinstance(each, SymbolicZero) else each for each in gradients)
    if gradient is None:
        gradient = jnp.zeros(x.shape, norm.dtype)
    within = beside if shift is None else None  # a shift's gradient is of the norm's alone
    if _is_whole(x.shape, norm.num_groups):
        to_x, *sums = _whole_backward(norm, gradient, within, *kept)
    else:
        sums = list(_gradient_sums(norm, gradient, *kept))
        means = _combine_gradient_sums(norm, x.shape, scale, sums[0], sums[1])
        to_x = _apply_gradient(norm, gradient, within, kept, means)
    # Frozen weights and the embedding of time need no gradient; the compiler then removes this as dead code.
    to_bias, to_scale = (part.sum(axis=(0, 1)) for part in sums)
    to_shift = None if shift is None else to_x.astype(jnp.float32).sum(axis=1).astype(shift.dtype)
    if beside is not None and within is None:
        to_x = to_x + beside
    return to_x, to_shift, to_scale.astype(scale.dtype), to_bias.astype(bias.dtype)


normalise.defvjp(_forward, _backward, symbolic_zeros=True)


# What all kernels share: arithmetic on blocks, float32.


def _activate(norm: Norm, z: jax.Array) -> jax.Array:
    return z * jax.nn.sigmoid(z) if norm.silu else z


def _before_activation(norm: Norm, z: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient with respect to z from that with respect to ``_activate(z)``."""
    if not norm.silu:
        return gradient
    chance = jax.nn.sigmoid(z)
    return gradient * (chance * (1.0 + z * (1.0 - chance)))


def _call(
    kernel: Callable[..., None],
    norm: Norm,
    name: str,
    grid: tuple[int, ...],
    arguments: Sequence[tuple[jax.Array, pl.BlockSpec]],
    results: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    num_warps: int,
) -> Any:
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec for _, spec in arguments],
        out_specs=[spec for *_, spec in results],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results],
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=norm.interpret,
        name=name,
    )(*(array for array, _ in arguments))


ALL = pl.BlockSpec()


def _row(ref: Any) -> jax.Array:
    """[1, C] of a block [C], float32."""
    return ref[...].astype(jnp.float32)[None]


# A whole group in one block: program (group, batch).


@dataclass(frozen=True)
class _Group:
    """Where a program's group is, in a block that is padded to powers of two."""

    rows: int
    columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...], num_groups: int) -> _Group:
        return cls(shape[1], shape[2] // num_groups)

    @property
    def row(self) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, (_padded(self.rows), 1), 0)

    @property
    def column(self) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, (1, _padded(self.columns)), 1)

    @property
    def inside(self) -> jax.Array:
        return (self.row < self.rows) & (self.column < self.columns)

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def num_warps(self) -> int:
        return min(16, max(1, _padded(self.rows) * _padded(self.columns) // 1024))

    def picture(self, ref: Any) -> Any:
        return ref.at[pl.program_id(1), self.row, pl.program_id(0) * self.columns + self.column]

    def channels(self, ref: Any, *batch: Any) -> jax.Array:
        """[1, columns] of an array [C] or [B, C], float32; 0 outside."""
        index = pl.program_id(0) * self.columns + self.column
        return plt.load(ref.at[(*batch, index)], mask=self.column < self.columns, other=0.0).astype(jnp.float32)

    def load(self, ref: Any) -> jax.Array:
        return plt.load(self.picture(ref), mask=self.inside, other=0.0).astype(jnp.float32)

    def store(self, ref: Any, block: jax.Array) -> None:
        plt.store(self.picture(ref), block.astype(ref.dtype), mask=self.inside)


def _given(*arrays: jax.Array | None) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """The arrays that are not None, whole."""
    return [(array, ALL) for array in arrays if array is not None]


def _whole_forward(
    norm: Norm, x: jax.Array, shift: jax.Array | None, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    group = _Group.of(x.shape, norm.num_groups)

    def kernel(x_ref: Any, *refs: Any) -> None:
        *shift_ref, scale_ref, bias_ref, normed_ref, mean_ref, rstd_ref = refs
        batch, number = pl.program_id(1), pl.program_id(0)
        block = group.load(x_ref)
        for ref in shift_ref:
            block = block + group.channels(ref, batch)
        mean = jnp.sum(jnp.where(group.inside, block, 0.0)) / group.size
        deviation = jnp.where(group.inside, block - mean, 0.0)
        rstd = jax.lax.rsqrt(jnp.sum(deviation * deviation) / group.size + norm.epsilon)
        z = deviation * rstd * group.channels(scale_ref) + group.channels(bias_ref)
        group.store(normed_ref, _activate(norm, z))
        mean_ref[batch, number] = mean
        rstd_ref[batch, number] = rstd

    of_groups = ((x.shape[0], norm.num_groups), jnp.float32, ALL)
    results = [(x.shape, norm.dtype, ALL), of_groups, of_groups]
    grid = (norm.num_groups, x.shape[0])
    arguments = _given(x, shift, scale, bias)
    return _call(kernel, norm, "group_norm", grid, arguments, results, group.num_warps)  # type: ignore[no-any-return]


def _whole_backward(
    norm: Norm,
    gradient: jax.Array,
    beside: jax.Array | None,
    x: jax.Array,
    shift: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    rstd: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    group = _Group.of(x.shape, norm.num_groups)

    def kernel(gradient_ref: Any, x_ref: Any, *refs: Any) -> None:
        refs, (scale_ref, bias_ref, mean_ref, rstd_ref, to_x_ref, to_bias_ref, to_scale_ref) = refs[:-7], refs[-7:]
        beside_ref, shift_ref = refs[: beside is not None], refs[beside is not None :]
        batch, number = pl.program_id(1), pl.program_id(0)
        block = group.load(x_ref)
        for ref in shift_ref:
            block = block + group.channels(ref, batch)
        rstd, scale = rstd_ref[batch, number], group.channels(scale_ref)
        normed = jnp.where(group.inside, (block - mean_ref[batch, number]) * rstd, 0.0)
        to_z = _before_activation(norm, normed * scale + group.channels(bias_ref), group.load(gradient_ref))
        channels = (batch, 0, number * group.columns + group.column)
        for ref, of in ((to_bias_ref, to_z), (to_scale_ref, to_z * normed)):
            plt.store(ref.at[channels], jnp.sum(of, axis=0, keepdims=True), mask=group.column < group.columns)
        to_normed = to_z * scale
        means = jnp.sum(to_normed) / group.size, jnp.sum(to_normed * normed) / group.size
        to_x = rstd * (to_normed - means[0] - normed * means[1])
        for ref in beside_ref:
            to_x = to_x + group.load(ref)
        group.store(to_x_ref, to_x)

    of_channels = ((x.shape[0], 1, x.shape[2]), jnp.float32, ALL)
    results = [(x.shape, x.dtype, ALL), of_channels, of_channels]
    arguments = _given(gradient, x, beside, shift, scale, bias, mean, rstd)
    grid = (norm.num_groups, x.shape[0])
    name = "group_norm_gradient"
    return _call(kernel, norm, name, grid, arguments, results, group.num_warps)  # type: ignore[no-any-return]


# A larger picture: program (tile of channels, block of rows, batch).


@dataclass(frozen=True)
class _Blocks:
    """How a picture is cut."""

    batch: int
    rows: int
    row_blocks: int
    tile: int
    tiles: int
    group_size: int  # channels

    @classmethod
    def of(cls, shape: tuple[int, ...], num_groups: int) -> _Blocks:
        batch, pixels, channels = shape
        rows, tile = _rows(pixels), _tile(channels)
        return cls(batch, rows, pixels // rows, tile, channels // tile, channels // num_groups)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.tiles, self.row_blocks, self.batch

    @property
    def num_warps(self) -> int:
        return max(1, self.rows * self.tile // 1024)

    @property
    def picture(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.rows, self.tile), lambda tile, row, batch: (batch, row, tile))

    @property
    def sums(self) -> pl.BlockSpec:
        """Of an array [B, row blocks, C]."""
        return pl.BlockSpec((None, 1, self.tile), lambda tile, row, batch: (batch, row, tile))

    @property
    def shift(self) -> pl.BlockSpec:
        """Of an array [B, 1, C]."""
        return pl.BlockSpec((None, 1, self.tile), lambda tile, row, batch: (batch, 0, tile))

    @property
    def channels(self) -> pl.BlockSpec:
        """Of an array [C]."""
        return pl.BlockSpec((self.tile,), lambda tile, row, batch: (tile,))

    def of_group(self, ref: Any) -> jax.Array:
        """[1, tile] from an array [B, G]: each channel gets its group's."""
        channel = pl.program_id(0) * self.tile + jax.lax.broadcasted_iota(jnp.int32, (1, self.tile), 1)
        return ref[pl.program_id(2), channel // self.group_size]

    def shifts(self, shift: jax.Array | None) -> list[tuple[jax.Array, pl.BlockSpec]]:
        return [] if shift is None else [(shift[:, None], self.shift)]


def _moments(norm: Norm, x: jax.Array, shift: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and ``1 / sqrt(variance + epsilon)`` of each group, float32 [B, G].

    Of the blocks' own means and squared deviations from them, which are combined exactly (Chan et al. 1979): sums of
    squares would cancel where a mean is far from 0.
    """
    blocks = _Blocks.of(x.shape, norm.num_groups)

    def kernel(x_ref: Any, *refs: Any) -> None:
        *shift_ref, mean_ref, square_ref = refs
        block = x_ref[...].astype(jnp.float32)
        for ref in shift_ref:
            block = block + ref[...].astype(jnp.float32)
        mean = jnp.sum(block, axis=0, keepdims=True) / blocks.rows
        deviation = block - mean
        mean_ref[...] = mean
        square_ref[...] = jnp.sum(deviation * deviation, axis=0, keepdims=True)

    of_blocks = ((blocks.batch, blocks.row_blocks, x.shape[2]), jnp.float32, blocks.sums)
    arguments = [(x, blocks.picture), *blocks.shifts(shift)]
    name = "group_norm_block_moments"
    sums = _call(kernel, norm, name, blocks.grid, arguments, [of_blocks, of_blocks], blocks.num_warps)

    group = _Group(blocks.row_blocks, blocks.group_size)

    def combine(means_ref: Any, squares_ref: Any, mean_ref: Any, rstd_ref: Any) -> None:
        batch, number = pl.program_id(1), pl.program_id(0)
        means = group.load(means_ref)
        mean = jnp.sum(means) / group.size
        deviation = jnp.where(group.inside, means - mean, 0.0)
        between = jnp.sum(deviation * deviation) / group.size
        within = jnp.sum(group.load(squares_ref)) / (group.size * blocks.rows)
        mean_ref[batch, number] = mean
        rstd_ref[batch, number] = jax.lax.rsqrt(between + within + norm.epsilon)

    of_groups = ((blocks.batch, norm.num_groups), jnp.float32, ALL)
    grid, name = (norm.num_groups, blocks.batch), "group_norm_moments"
    return _call(combine, norm, name, grid, _given(*sums), [of_groups, of_groups], group.num_warps)  # type: ignore[no-any-return]


def _apply(
    norm: Norm,
    x: jax.Array,
    shift: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    rstd: jax.Array,
) -> jax.Array:
    blocks = _Blocks.of(x.shape, norm.num_groups)

    def kernel(x_ref: Any, *refs: Any) -> None:
        *shift_ref, scale_ref, bias_ref, mean_ref, rstd_ref, normed_ref = refs
        block = x_ref[...].astype(jnp.float32)
        for ref in shift_ref:
            block = block + ref[...].astype(jnp.float32)
        normed = (block - blocks.of_group(mean_ref)) * blocks.of_group(rstd_ref)
        normed_ref[...] = _activate(norm, normed * _row(scale_ref) + _row(bias_ref)).astype(normed_ref.dtype)

    of_channels = [(array, blocks.channels) for array in (scale, bias)]
    arguments = [(x, blocks.picture), *blocks.shifts(shift), *of_channels, *_given(mean, rstd)]
    results = [(x.shape, norm.dtype, blocks.picture)]
    (normed,) = _call(kernel, norm, "group_norm", blocks.grid, arguments, results, blocks.num_warps)
    return normed  # type: ignore[no-any-return]


def _gradient_sums(
    norm: Norm,
    gradient: jax.Array,
    x: jax.Array,
    shift: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    rstd: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sums over each block's rows of the gradients with respect to bias and scale: float32 [B, row blocks, C]."""
    blocks = _Blocks.of(x.shape, norm.num_groups)

    def kernel(gradient_ref: Any, x_ref: Any, *refs: Any) -> None:
        *shift_ref, scale_ref, bias_ref, mean_ref, rstd_ref, to_bias_ref, to_scale_ref = refs
        block = x_ref[...].astype(jnp.float32)
        for ref in shift_ref:
            block = block + ref[...].astype(jnp.float32)
        normed = (block - blocks.of_group(mean_ref)) * blocks.of_group(rstd_ref)
        z = normed * _row(scale_ref) + _row(bias_ref)
        to_z = _before_activation(norm, z, gradient_ref[...].astype(jnp.float32))
        to_bias_ref[...] = jnp.sum(to_z, axis=0, keepdims=True)
        to_scale_ref[...] = jnp.sum(to_z * normed, axis=0, keepdims=True)

    of_channels = [(array, blocks.channels) for array in (scale, bias)]
    pictures = [(gradient, blocks.picture), (x, blocks.picture)]
    arguments = [*pictures, *blocks.shifts(shift), *of_channels, *_given(mean, rstd)]
    of_blocks = ((blocks.batch, blocks.row_blocks, x.shape[2]), jnp.float32, blocks.sums)
    name = "group_norm_gradient_sums"
    return _call(kernel, norm, name, blocks.grid, arguments, [of_blocks, of_blocks], blocks.num_warps)  # type: ignore[no-any-return]


def _combine_gradient_sums(
    norm: Norm, shape: tuple[int, ...], scale: jax.Array, to_bias: jax.Array, to_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Means over each group of the gradient towards the normalised picture, and of it times that picture: [B, G]."""
    blocks = _Blocks.of(shape, norm.num_groups)
    group = _Group(blocks.row_blocks, blocks.group_size)

    def kernel(to_bias_ref: Any, to_scale_ref: Any, scale_ref: Any, *results: Any) -> None:
        scale = group.channels(scale_ref)
        for ref, result in zip((to_bias_ref, to_scale_ref), results, strict=True):
            mean = jnp.sum(group.load(ref) * scale) / (group.size * blocks.rows)
            result[pl.program_id(1), pl.program_id(0)] = mean

    of_groups = ((blocks.batch, norm.num_groups), jnp.float32, ALL)
    arguments, grid = _given(to_bias, to_scale, scale), (norm.num_groups, blocks.batch)
    name = "group_norm_gradient_means"
    return _call(kernel, norm, name, grid, arguments, [of_groups, of_groups], group.num_warps)  # type: ignore[no-any-return]


def _apply_gradient(
    norm: Norm,
    gradient: jax.Array,
    beside: jax.Array | None,
    kept: tuple[Any, ...],
    means: tuple[jax.Array, jax.Array],
) -> jax.Array:
    x, shift, scale, bias, *moments = kept
    blocks = _Blocks.of(x.shape, norm.num_groups)

    def kernel(gradient_ref: Any, x_ref: Any, *refs: Any) -> None:
        refs, (scale_ref, bias_ref, mean_ref, rstd_ref, mean_gradient_ref, mean_product_ref, to_x_ref) = (
            refs[:-7],
            refs[-7:],
        )
        beside_ref, shift_ref = refs[: beside is not None], refs[beside is not None :]
        block = x_ref[...].astype(jnp.float32)
        for ref in shift_ref:
            block = block + ref[...].astype(jnp.float32)
        rstd, scale = blocks.of_group(rstd_ref), _row(scale_ref)
        normed = (block - blocks.of_group(mean_ref)) * rstd
        to_z = _before_activation(norm, normed * scale + _row(bias_ref), gradient_ref[...].astype(jnp.float32))
        centred = to_z * scale - blocks.of_group(mean_gradient_ref) - normed * blocks.of_group(mean_product_ref)
        to_x = rstd * centred
        for ref in beside_ref:
            to_x = to_x + ref[...].astype(jnp.float32)
        to_x_ref[...] = to_x.astype(to_x_ref.dtype)

    pictures = [(array, blocks.picture) for array in (gradient, x, beside) if array is not None]
    of_channels = [(array, blocks.channels) for array in (scale, bias)]
    of_groups = _given(*moments, *means)
    arguments = [*pictures, *blocks.shifts(shift), *of_channels, *of_groups]
    results = [(x.shape, x.dtype, blocks.picture)]
    (to_x,) = _call(kernel, norm, "group_norm_gradient", blocks.grid, arguments, results, blocks.num_warps)
    return to_x  # type: ignore[no-any-return]
