"""Checkpoints without a run: which are read, what they are compared with, and what is saved after an older one."""

import dataclasses

import numpy as np
import pytest

from ti_jax.config.fields import settings_of
from ti_jax.errors import InputError
from ti_jax.training import run_folder
from ti_jax.training.checkpoint import DRAWS, Checkpoints, fingerprint
from ti_jax.training.step import TrainState

IDENTITY = {"seed": 1, "draws": DRAWS, "gradient_checkpointing": "policy", "counts": "by row"}


def state(step, value=None):
    rows = {"text_encoder": np.full((1, 4), step if value is None else value, np.float32)}
    moments = {"mu": np.full((1, 4), step, np.float32), "count": np.full(1, step, np.int32)}
    return TrainState(rows, {"text_encoder": moments}, np.int32(step), np.bool_(True))


def save_older(folder, identity):
    """A checkpoint of step 5 from before the rows had counts of their own, and from before other entries."""
    now = state(5)
    opt_state = {"inner": {"mu": {"text_encoder": now.opt_state["text_encoder"]["mu"]}, "count": np.int32(5)}}
    checkpoints = Checkpoints(folder / "checkpoints", None)
    checkpoints.identity = identity
    checkpoints.save(now._replace(opt_state=opt_state))
    checkpoints.close()


@pytest.fixture
def folder(tmp_path):
    """With checkpoints at 5, 10 and 15."""
    checkpoints = opened(tmp_path)
    for step in (5, 10, 15):
        checkpoints.save(state(step))
    checkpoints.close()
    return tmp_path / "checkpoints"


def opened(folder, **identity):
    checkpoints = Checkpoints(folder / "checkpoints", None)
    checkpoints.identity = IDENTITY | identity
    return checkpoints


def value(restored):
    return int(restored.step), float(restored.rows["text_encoder"][0, 0])


def damage(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def test_a_run_from_an_older_checkpoint_saves_its_own(folder):
    checkpoints = opened(folder.parent)
    assert value(checkpoints.restore(str(folder / "5"), state(0))) == (5, 5)
    run_folder.prepare(folder.parent, 5)
    for step in (7, 10):
        checkpoints.save(state(step, value=-step))
    checkpoints.close()
    assert value(opened(folder.parent).restore("latest", state(0))) == (10, -10)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "5", "7"]


def test_what_orbax_declines_to_save_is_an_error(folder):
    checkpoints = opened(folder.parent)
    with pytest.raises(InputError, match=r"step 7 was not saved: .* has later ones"):
        checkpoints.save(state(7))
    checkpoints.close()


def test_a_damaged_newest_one_is_passed_over_and_replaced(folder, capsys):
    damage(folder / "15")
    checkpoints = opened(folder.parent)
    assert value(checkpoints.restore("latest", state(0))) == (10, 10)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: checkpoint {folder / '15'} cannot be read") and told.count("\n") == 1
    run_folder.prepare(folder.parent, 10)
    checkpoints.save(state(15, value=1))
    checkpoints.close()
    assert value(opened(folder.parent).restore("latest", state(0))) == (15, 1)


def test_where_none_can_be_read_one_line(folder):
    for step in (5, 10, 15):
        damage(folder / str(step))
    with pytest.raises(InputError, match=r"5 cannot be read .*resume from another one") as error:
        opened(folder.parent).restore("latest", state(0))
    assert "\n" not in str(error.value)
    assert opened(folder.parent / "none").restore("latest", state(0)) is None


def test_latest_does_not_pass_over_a_checkpoint_of_another_run(folder):
    with pytest.raises(InputError, match=r"15 belongs to another run \(seed 1 there, 2 here\)"):
        opened(folder.parent, seed=2).restore("latest", state(0))


def test_rematerialisation_that_is_not_chosen_is_the_checkpoints(folder):
    checkpoints = opened(folder.parent, gradient_checkpointing=None)
    checkpoints.restore("latest", state(0))
    assert checkpoints.identity["gradient_checkpointing"] == "policy"
    with pytest.raises(InputError, match="gradient_checkpointing policy there, full here"):
        opened(folder.parent, gradient_checkpointing="full").restore("latest", state(0))


def test_where_all_rows_shared_a_count_each_has_it(tmp_path):
    save_older(tmp_path, {"seed": 1})
    restored = opened(tmp_path, gradient_checkpointing=None).restore("latest", state(0))
    assert restored.opt_state["text_encoder"]["count"].tolist() == [5]
    assert np.array_equal(restored.opt_state["text_encoder"]["mu"], np.full((1, 4), 5, np.float32))


def test_an_older_rule_of_drawing_is_refused_and_none_is_taken_for_ours(tmp_path):
    for name, identity in (("old", {"draws": 1}), ("first", {})):
        save_older(tmp_path / name, {"seed": 1, **identity})
    with pytest.raises(InputError, match=f"draws 1 there, {DRAWS} here"):
        opened(tmp_path / "old").restore("latest", state(0))
    checkpoints = opened(tmp_path / "first", gradient_checkpointing=None)
    assert value(checkpoints.restore("latest", state(0))) == (5, 5)
    assert checkpoints.identity["gradient_checkpointing"] is None


def test_a_checkpoint_from_before_a_setting_was_an_entry_has_its_default(tmp_path):
    """AdamW's four settings were one entry, in this order; a flag of tomorrow is in no checkpoint of today."""
    save_older(tmp_path, {"seed": 1, "adam": [0.8, 0.99, 1e-7, 0.01]})
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-7, "adam_weight_decay": 0.01}
    assert value(opened(tmp_path, **adam).restore("latest", state(0))) == (5, 5)
    with pytest.raises(InputError, match=r"\(adam_epsilon 1e-07 there, 1e-08 here\)"):
        opened(tmp_path, **adam | {"adam_epsilon": 1e-8}).restore("latest", state(0))
    assert value(opened(tmp_path, flip_probability=0.5).restore("latest", state(0))) == (5, 5)
    with pytest.raises(InputError, match=r"\(flip_probability 0.5 there, 0 here\)"):
        opened(tmp_path, flip_probability=0).restore("latest", state(0))


def test_the_fingerprint_has_what_the_rows_depend_on(short_run):
    def of(config, prompt_counts=(1, 3)):
        return fingerprint(
            config, model_identity="m", prediction_type="epsilon", dtype=np.float32, pictures="p", masks=None,
            prompts=["a"], prompt_counts=prompt_counts, words={"<x>": 1}, initializer_embedding=None, embeddings=None,
            global_batch=1, total_steps=10,
        )  # fmt: skip

    mine = of(short_run)
    assert mine["draws"] == of(short_run, [64, 1024])["draws"] == DRAWS
    assert of(short_run, [255, 256, 257])["draws"] > DRAWS, "these were drawn otherwise"
    other = of(dataclasses.replace(short_run, gradient_checkpointing="full"))
    assert {name for name in mine if mine[name] != other[name]} == {"gradient_checkpointing"}
    for name, about in settings_of(short_run).items():
        if about.fingerprint:
            assert mine[name] == getattr(short_run, name), name
