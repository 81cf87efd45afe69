"""What a picture is described by while it is learned from, and how often it is shown."""

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.data.dataset import Dataset, joined
from ti_jax.diffusion.schedule import NoiseSchedule
from ti_jax.training.step import StepInputs, draw_batch

PICTURES, PROMPTS = 3, 5


def frozen_with(prompts_of, entries, prompt_counts=None):
    """The step's inputs, as far as they are drawn from. The moments say which picture they belong to."""
    marked = jnp.broadcast_to(jnp.arange(float(PICTURES))[:, None, None, None, None], (PICTURES, 2, 2, 2, 2))
    one = jnp.float32(1)
    dataset = Dataset(
        moments=marked.at[..., 1:].set(-60.0),  # no variance
        ids={"text_encoder": jnp.arange(PROMPTS)[:, None] * jnp.ones((1, 4), jnp.int32)},
        prompts_of=jnp.asarray(prompts_of, jnp.int32),
        entries=jnp.asarray(entries, jnp.int32),
        time_ids=jnp.zeros((PICTURES, 2, 6)),
        flip_probability=one / 2,
        latent_scale=one,
        latent_shift=one * 0,
        prompt_counts=prompt_counts if prompt_counts is None else jnp.asarray(prompt_counts, jnp.int32),
    )
    schedule = NoiseSchedule(jnp.linspace(0.9, 0.1, 20), "epsilon")
    return StepInputs({}, schedule, dataset, {}, jax.random.key(7))


def draws(frozen, steps, batch=2):
    """Pictures and prompts of the first steps."""
    draw = jax.jit(jax.vmap(lambda step: draw_batch(frozen, step, jnp.arange(batch), batch)))
    drawn = draw(jnp.arange(steps))
    return np.asarray(drawn.latents[..., 0, 0, 0]).round().astype(int).ravel(), np.asarray(drawn.prompts).ravel()


def test_without_captions_the_draws_are_those_of_always():
    """Written out as they were before pictures had prompts of their own: a seed gives the rows that it always gave."""
    frozen = frozen_with(np.broadcast_to(np.arange(PROMPTS), (PICTURES, PROMPTS)), np.arange(PICTURES))
    expected = []
    for turn in range(40):
        step, position = divmod(turn, 2)
        order_key, sample_key, _ = jax.random.split(frozen.key, 3)
        sample_key = jax.random.fold_in(jax.random.fold_in(sample_key, step), position)
        _, prompt_key, _, _ = jax.random.split(sample_key, 4)
        shuffled = jax.random.permutation(jax.random.fold_in(order_key, turn // PICTURES), PICTURES)
        expected.append((int(shuffled[turn % PICTURES]), int(jax.random.randint(prompt_key, (), 0, PROMPTS))))
    assert list(zip(*draws(frozen, 20), strict=True)) == expected
    assert len({prompt for _, prompt in expected}) == PROMPTS


def test_a_picture_is_drawn_with_its_own_prompts_as_often_as_it_is_an_entry():
    prompts_of = [[0, 1], [2, 2], [3, 4]]
    pictures, prompts = draws(frozen_with(prompts_of, [0, 1, 1, 1, 2]), steps=200)
    assert all(prompt in prompts_of[picture] for picture, prompt in zip(pictures, prompts, strict=True))
    assert np.bincount(pictures).tolist() == [80, 240, 80], "each epoch of five shows the second one three times"
    assert set(prompts) == {0, 1, 2, 3, 4}


def test_pictures_with_other_numbers_of_prompts():
    """Each of a picture's own prompts is equally likely, and drawn as from a table in which rows are repeated until all
    are equally long."""
    lengths = [1, 3, 5]
    rows = [list(range(length)) for length in lengths]
    padded = [row + [-1] * (5 - len(row)) for row in rows]
    drawn = draws(frozen_with(padded, np.arange(PICTURES), lengths), steps=1500)
    repeated = draws(frozen_with([row * (15 // len(row)) for row in rows], np.arange(PICTURES)), steps=1500)
    np.testing.assert_array_equal(drawn, repeated)
    pictures, prompts = drawn
    for picture, length in enumerate(lengths):
        counts = np.bincount(prompts[pictures == picture], minlength=PROMPTS)
        assert counts[length:].sum() == 0
        # Five standard deviations of a binomial distribution.
        assert np.abs(counts[:length] - 1000 / length).max() <= 5 * np.sqrt(1000 / length)


def test_equal_numbers_of_prompts_are_drawn_from_as_if_none_were_told():
    prompts_of = [[0, 1, 2, 3, 4]] * PICTURES
    plain = draws(frozen_with(prompts_of, np.arange(PICTURES)), steps=40)
    np.testing.assert_array_equal(draws(frozen_with(prompts_of, np.arange(PICTURES), [5] * 3), steps=40), plain)


def test_tables_of_several_concepts_are_joined():
    """The first has two pictures and up to three prompts for each of them; the second one picture, and two prompts."""
    tables = [(3, np.array([[0, 1, 2], [2, 1, -1]])), (2, np.array([[1, 0]]))]
    assert joined(tables).tolist() == [[0, 1, 2], [2, 1, -1], [4, 3, -1]]
    many = [(length, np.arange(length)[None]) for length in (97, 89, 83, 79, 73)]
    assert joined(many).shape == (5, 97), "not as wide as the least common multiple, of more than four billion"
