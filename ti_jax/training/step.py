"""One update of the trained rows, written for one device with a named axis; `parallel` maps it over the devices.

All randomness is derived from (seed, step, global sample position), so that a run's result depends neither on how many
devices share the batch nor on where the run was interrupted.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ti_jax.data.dataset import Dataset
from ti_jax.data.sharing import next_entry
from ti_jax.diffusion.losses import Objective, elementwise, mean_over_samples, min_snr_weights, offset_noise
from ti_jax.diffusion.schedule import NoiseSchedule, add_noise, training_target
from ti_jax.models.networks import Condition, Networks, Rows
from ti_jax.ops.lookup import lookup
from ti_jax.ops.matmul import exact_products
from ti_jax.training.optimizer import shown_rows
from ti_jax.training.plateau import Watch
from ti_jax.training.terms import Terms, added_loss

# From so many entries on, a batch shares the orders of its epochs, see `orders_of`.
MANY_ENTRIES = 1024


class TrainState(NamedTuple):
    """Everything that changes while training: a few kilobytes."""

    rows: Rows  # float32 [n, D] for each text encoder
    opt_state: optax.OptState
    step: jax.Array  # int32: updates made
    ok: jax.Array  # bool: false from the first non-finite loss or gradient on; rows and moments are those before it
    watch: Watch | None = None  # of a run with --early_stop

    @property
    def shown_rows(self) -> Rows:
        """The rows that are saved, drawn and measured; see `ti_jax.training.optimizer.shown_rows`."""
        return shown_rows(self.rows, self.opt_state)


class StepInputs(NamedTuple):
    """Constant inputs of the compiled loop. As captured constants, XLA would copy them into the program."""

    params: Mapping[str, Any]  # the text encoders' and the UNet's trees
    schedule: NoiseSchedule
    dataset: Dataset
    row_mask: Mapping[str, jax.Array]  # bool [n] for each text encoder: rows that are trained
    key: jax.Array
    objective: Objective = Objective()
    terms: Terms | None = None  # that are added to the loss


class Fed(NamedTuple):
    """What samples take from a dataset whose moments are on the host: see `ti_jax.training.feeding`."""

    pictures: jax.Array  # int32 [...]
    mirrored: jax.Array  # int32 [...]: 1 for the mirror image
    moments: jax.Array  # float32 [..., h, w, 2c]
    masks: jax.Array | None  # float32 [..., h, w]; None: all latents weigh the same


class Batch(NamedTuple):
    """One batch as the UNet sees it."""

    latents: jax.Array  # float32 [B, h, w, c], scaled
    noise: jax.Array  # float32 [B, h, w, c]
    timesteps: jax.Array  # int32 [B]
    ids: Mapping[str, jax.Array]  # int32 [B, L] for each text encoder
    time_ids: jax.Array  # float32 [B, 6]
    prompts: jax.Array  # int32 [B]: each sample's index into the dataset's table of prompts
    masks: jax.Array | None = None  # float32 [B, h, w]: weight of the loss at each latent; None: all weigh the same


def sample_key(key: jax.Array, step: jax.Array, position: jax.Array) -> jax.Array:
    """The key of the sample at a position of an update's batch, to be split; ``key`` is the one of all samples."""
    return jax.random.fold_in(jax.random.fold_in(key, step), position)


def is_mirrored(flip_key: jax.Array, probability: jax.Array) -> jax.Array:
    """1 if a sample shows the mirror image, else 0: int32 scalar; ``flip_key`` is the first split of the sample's."""
    return jax.random.bernoulli(flip_key, probability).astype(jnp.int32)


def shuffled(order_key: jax.Array, num_entries: int, epoch: jax.Array) -> jax.Array:
    """The order in which an epoch shows a dataset's entries, int32 [num_entries], if there is one concept."""
    return jax.random.permutation(jax.random.fold_in(order_key, epoch), num_entries)


def draw_sample(
    frozen: StepInputs,
    step: jax.Array,
    position: jax.Array,
    global_batch: int,
    turn: jax.Array | None = None,
    fed: Fed | None = None,
    orders: jax.Array | None = None,
) -> Batch:
    """Picture, mirror, prompt, latent, noise and timestep of one sample (leaves without the batch axis).

    The dataset's entries are reshuffled every epoch, so that each is seen equally often; see `_entry`. Timesteps are
    stratified: sample i of a global batch of B gets ``(u + i*T//B) mod T`` with one uniform integer u per update. Each
    timestep stays uniform, and every batch covers the schedule (Variational Diffusion Models, arXiv 2107.00630,
    appendix I.1). Everything else is drawn independently. With a ``timestep_range`` T counts those within it.

    Args:
      step: int32 scalar, the update's number. position: int32 scalar in [0, global_batch), the sample's index over
        micro-batches and devices. turn: int32 scalar, how many updates before this one had the same dataset; None: all.
      fed: the sample's part of the dataset, whose moments and masks are not on the device; None: they are.
      orders: from `orders_of`.
    """
    dataset = frozen.dataset
    order_key, samples_key, timestep_key = jax.random.split(frozen.key, 3)
    own_key = sample_key(samples_key, step, position)
    flip_key, prompt_key, latent_key, noise_key = jax.random.split(own_key, 4)
    offset_key = jax.random.fold_in(own_key, 4)  # none of the four, which are as they were before it was drawn

    if fed is None:
        turn = step if turn is None else turn
        picture = dataset.entries[_entry(dataset, order_key, turn, position, global_batch, orders)]
        mirrored = is_mirrored(flip_key, dataset.flip_probability)
    else:
        picture, mirrored = fed.pictures, fed.mirrored
    count = dataset.prompts_of.shape[1] if dataset.prompt_counts is None else dataset.prompt_counts[picture]
    prompt = dataset.prompts_of[picture, jax.random.randint(prompt_key, (), 0, count)]
    low, high = frozen.objective.timestep_range or (0, frozen.schedule.alphas_cumprod.shape[0])
    num_timesteps = high - low
    first = jax.random.randint(jax.random.fold_in(timestep_key, step), (), 0, num_timesteps)

    part: Any = dataset if fed is None else fed

    def own(array: Any) -> Any:
        return array[picture, mirrored] if fed is None and array is not None else array

    mean, log_variance = jnp.split(own(part.moments), 2, axis=-1)
    latent = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(latent_key, mean.shape)
    noise = jax.random.normal(noise_key, mean.shape)
    return Batch(
        latents=(latent - dataset.latent_shift) * dataset.latent_scale,
        noise=offset_noise(offset_key, noise, frozen.objective.noise_offset),
        timesteps=low + (first + position * num_timesteps // global_batch) % num_timesteps,
        ids={name: ids[prompt] for name, ids in dataset.ids.items()},
        time_ids=dataset.time_ids[picture, mirrored],
        prompts=prompt,
        masks=own(part.masks),
    )


def _entry(
    dataset: Dataset,
    order_key: jax.Array,
    turn: jax.Array,
    position: jax.Array,
    global_batch: int,
    orders: jax.Array | None,
) -> jax.Array:
    """The entry of a sample, int32 scalar, see `draw_sample`; several concepts take turns."""
    num_entries = dataset.entries.shape[0]
    if dataset.sharing is not None:
        return next_entry(dataset.sharing, num_entries, order_key, turn, position, global_batch)
    number = turn * global_batch + position
    if orders is not None:
        return orders[number // num_entries - turn * global_batch // num_entries, number % num_entries]
    return shuffled(order_key, num_entries, number // num_entries)[number % num_entries]


def orders_of(dataset: Dataset, key: jax.Array, turn: jax.Array, global_batch: int) -> jax.Array | None:
    """The orders of the epochs that an update's samples may belong to, int32 [2, number of entries].

    Sorting the entries for each sample is a quarter of a step of the embedded model with 10,000 of them, on a CPU. It
    is nothing with few, for which this is None; so it is where concepts have orders of their own.
    """
    num_entries = dataset.entries.shape[0]
    if num_entries < max(MANY_ENTRIES, global_batch) or dataset.sharing is not None:
        return None
    order_key, _, _ = jax.random.split(key, 3)
    first, last = turn * global_batch // num_entries, ((turn + 1) * global_batch - 1) // num_entries
    order = shuffled(order_key, num_entries, first)
    return jnp.stack([order, lax.cond(last > first, lambda: shuffled(order_key, num_entries, last), lambda: order)])


def draw_batch(
    frozen: StepInputs,
    step: jax.Array,
    positions: jax.Array,
    global_batch: int,
    turn: jax.Array | None = None,
    fed: Fed | None = None,
) -> Batch:
    """The samples at ``positions`` int32 [B] of an update's global batch; leaves of ``fed`` are [B, ...]."""

    orders = None
    if fed is None:
        orders = orders_of(frozen.dataset, frozen.key, step if turn is None else turn, global_batch)

    def draw(position: jax.Array, fed: Fed | None) -> Batch:
        return draw_sample(frozen, step, position, global_batch, turn, fed, orders)

    return jax.vmap(draw)(positions, fed)


def diffusion_loss(
    networks: Networks, frozen: StepInputs, rows: Rows, batch: Batch, condition: Condition | None = None
) -> jax.Array:
    """The objective's mean over a batch, float32 scalar; by default the UNet's mean squared error (2208.01618, eq. 2).

    Args:
      condition: the batch's encoded prompts; None: encode each sample's prompt here.
    """
    noisy = add_noise(frozen.schedule, batch.latents, batch.noise, batch.timesteps)
    target = training_target(frozen.schedule, batch.latents, batch.noise, batch.timesteps)
    if condition is None:
        condition = networks.encode_text(frozen.params, batch.ids, rows)
    if condition.pooled is not None:
        condition = condition._replace(time_ids=batch.time_ids)
    prediction = networks.predict_noise(frozen.params, noisy, batch.timesteps, condition)
    if frozen.dataset.negative is not None:
        prediction = guided_away(networks, frozen, rows, noisy, batch, prediction)
    losses = elementwise(frozen.objective, prediction, target)
    if batch.masks is not None:
        losses = losses * batch.masks[..., None]
    weights = None
    if (gamma := frozen.objective.snr_gamma) is not None:
        weights = min_snr_weights(frozen.schedule, batch.timesteps, gamma)
    return mean_over_samples(losses, weights)


def samples_with(networks: Networks, rows: Rows, ids: Mapping[str, jax.Array]) -> Rows:
    """The number of samples whose prompts have each row: float32 [n] for each text encoder, from ids int32 [B, L]."""
    counts = {}
    for name, module in networks.text_encoders:
        numbers = module.config.vocab_size + jnp.arange(rows[name].shape[0])
        present = (ids[name][:, :, None] == numbers).any(axis=1)
        counts[name] = present.sum(axis=0).astype(jnp.float32)
    return counts


def guided_away(
    networks: Networks, frozen: StepInputs, rows: Rows, noisy: jax.Array, batch: Batch, prediction: jax.Array
) -> jax.Array:
    """``negative + w (prediction - negative)`` with the word of the negative prompt, float32 [B, h, w, c].

    This is `ti_jax.pipeline.sampling`'s classifier-free guidance with the word alone as the negative prompt; gradients
    go to its rows only. DreamArtist (Dong et al. 2022, arXiv 2211.11337) has it with w > 1, and learns a second word
    in the prompt, which is fixed here. For the least loss the word's prediction is
    ``prediction + (target - prediction) / (1 - w)``: with w < 1 beyond the pictures, with w > 1 on their other side.

    Args:
      noisy: latents [B, h, w, c]. prediction: of the batch's prompts.
    """
    negative = frozen.dataset.negative
    assert negative is not None, "the run learns a word for the negative prompt"
    encoded = networks.encode_text(frozen.params, negative.ids, rows)
    condition = jax.tree.map(lambda each: jnp.repeat(each, noisy.shape[0], axis=0), encoded)
    if condition.pooled is not None:
        condition = condition._replace(time_ids=batch.time_ids)
    unwanted = networks.predict_noise(frozen.params, noisy, batch.timesteps, condition).astype(jnp.float32)
    wanted = lax.stop_gradient(prediction.astype(jnp.float32))
    return unwanted + negative.guidance_scale * (wanted - unwanted)


def encode_once(
    networks: Networks, frozen: StepInputs, rows: Rows, batch: Batch, devices: int, axis_name: str
) -> Condition | None:
    """The batch's condition, from encoding each of the dataset's prompts once; None if encoding the batch is cheaper.

    With ``devices`` > 1 the prompts are sharded over them and the results all-gathered. Backward is a reduce-scatter:
    each device holds d(sum of losses)/d(rows) by its own prompts, and `pmean` makes of it the mean loss's gradient.

    Args:
      devices: number of devices along `axis_name` that share the prompts; 1: each encodes all of them.
    """
    ids = frozen.dataset.ids
    num_prompts = next(iter(ids.values())).shape[0]
    share = -(-num_prompts // devices)
    if share >= batch.prompts.shape[0]:
        return None
    if devices > 1:  # the last shard is padded with the last prompt
        mine = jnp.minimum(lax.axis_index(axis_name) * share + jnp.arange(share), num_prompts - 1)
        ids = {name: each[mine] for name, each in ids.items()}
    encoded = networks.encode_text(frozen.params, ids, rows)
    if devices > 1:
        encoded = jax.tree.map(lambda part: lax.all_gather(part, axis_name, tiled=True), encoded)
    take = lookup if networks.deterministic else operator.getitem
    return jax.tree.map(lambda each: take(each, batch.prompts), encoded)


def make_train_step(
    networks: Networks,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    batch_size: int,
    accumulation: int,
    num_devices: int,
    axis_name: str,
    shard_prompts: bool = False,
):
    """The update of one device: ``step(frozen, state, turn=None, fed=None)``, under a mapped axis ``axis_name``.

    It returns (state, loss). ``turn`` and ``fed`` are as in `draw_sample`; leaves are [accumulation, batch_size, ...].

    Args:
      batch_size: samples on this device in one micro-batch; accumulation: micro-batches whose gradients are averaged.
      num_devices: size of the axis.
      shard_prompts: shard the prompts over the devices (`encode_once`). Worth it between devices of one CPU, where the
        all-gather of the text encoder's output is free. Otherwise only rows and scalars are sent between devices.

    Each device takes the gradient of its own loss; one ``pmean``, of the rows' size, averages it over the devices. This
    is right under `jax.pmap`, or `jax.shard_map` without ``check_vma``: with it, the gradient with respect to
    replicated rows would already be summed over the devices.
    """
    global_batch = batch_size * accumulation * num_devices

    def several(frozen: StepInputs) -> bool:
        return frozen.dataset.sharing is not None

    def micro_batch_gradient(
        frozen: StepInputs, state: TrainState, turn: jax.Array | None, fed: Fed | None, index: jax.Array
    ) -> tuple[jax.Array, Rows, Rows]:
        first = (index * num_devices + lax.axis_index(axis_name)) * batch_size
        fed = jax.tree.map(lambda leaf: leaf[index], fed)
        batch = draw_batch(frozen, state.step, first + jnp.arange(batch_size), global_batch, turn, fed)

        def loss(rows: Rows) -> jax.Array:
            condition = encode_once(networks, frozen, rows, batch, num_devices if shard_prompts else 1, axis_name)
            return diffusion_loss(networks, frozen, rows, batch, condition)

        with exact_products(networks.dtype):  # of the backward pass, too
            value, grads = jax.value_and_grad(loss)(state.rows)
        return value, grads, samples_with(networks, state.rows, batch.ids) if several(frozen) else {}

    def train_step(
        frozen: StepInputs, state: TrainState, turn: jax.Array | None = None, fed: Fed | None = None
    ) -> tuple[TrainState, jax.Array]:
        if accumulation == 1:
            loss, grads, counts = micro_batch_gradient(frozen, state, turn, fed, jnp.int32(0))
        else:

            def accumulate(index, total):
                return jax.tree.map(jnp.add, total, micro_batch_gradient(frozen, state, turn, fed, index))

            no_counts = {name: jnp.zeros(len(rows)) for name, rows in state.rows.items() if several(frozen)}
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.rows), no_counts)
            total = lax.fori_loop(0, accumulation, accumulate, zero)
            loss, grads, counts = jax.tree.map(lambda x: x / accumulation, total)
        loss, grads, counts = lax.pmean((loss, grads, counts), axis_name)

        row_mask = frozen.row_mask
        if several(frozen):
            # Of several words each learns as if alone: from the mean over the samples that have it, if there are any.
            row_mask = {name: mask & (counts[name] > 0) for name, mask in row_mask.items()}
            grads = {
                name: grad * (batch_size / jnp.maximum(counts[name], 1 / global_batch))[:, None]
                for name, grad in grads.items()
            }
        if (terms := frozen.terms) is not None:
            with exact_products(networks.dtype):
                added = partial(added_loss, networks, frozen.params, terms)
                value, own_grads = jax.value_and_grad(added)(state.rows)
            loss, grads = loss + terms.share * value, jax.tree.map(jnp.add, grads, own_grads)
        if state.watch is not None:
            row_mask = {name: mask & ~state.watch.halted for name, mask in row_mask.items()}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.rows, row_mask=row_mask)
        rows = optax.apply_updates(state.rows, updates)
        updated = state._replace(rows=rows, opt_state=opt_state, step=state.step + 1)
        # No NaN may reach the rows, which are what the user keeps, and no overflow: a row whose norm is infinite is
        # lost even if its entries are finite.
        lengths = jax.tree.map(lambda rows: jnp.linalg.norm(rows, axis=-1), updated.rows)
        finite = jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, grads, lengths))]))
        stopped = state._replace(ok=jnp.bool_(False))
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, stopped)
        return state, jnp.where(finite, loss, jnp.nan)

    return train_step
