"""Float32 means float32 products on every platform, and not a TPU's bfloat16 or a GPU's TF32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ti_jax import pipeline, sampling, text_encoders
from ti_jax.diffusion.samplers import make_sampler
from ti_jax.evaluation import clip, judge
from ti_jax.models.clip_text import CLIPTextConfig
from ti_jax.models.clip_vision import CLIPModel, CLIPVisionConfig
from ti_jax.ops.attention import flash_attention
from ti_jax.ops.matmul import exact_products
from ti_jax.pipeline import StableDiffusion
from ti_jax.planning import PlanConfig, Planner, resolve_plan
from ti_jax.training.optimizer import make_optimizer
from ti_jax.training.parallel import AXIS, make_run_steps
from ti_jax.training.step import TrainState, make_train_step
from ti_jax.weights.load import param_shapes

PLATFORMS = ("tpu", "cuda")


def precisions(traced, platform):
    """Of every product and convolution in a program: its precision, or ""."""
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution)\(?.*", text)
    assert len(products) > 5
    return {"HIGHEST" if re.search(r"HIGHEST.*HIGHEST", product) else "" for product in products}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "")])
def test_training(tiny_sdxl, dtype, precision, platform):
    config = resolve_plan(PlanConfig(pretrained_model_name_or_path=str(tiny_sdxl), train_batch_size=2))
    planner = Planner(config, dtype, jax.devices()[:1])
    optimizer, _ = make_optimizer(config, 1, 2)
    rows = planner._rows()
    numbers = [jax.ShapeDtypeStruct((), kind) for kind in (jnp.int32, jnp.bool_)]
    state = TrainState(rows, jax.eval_shape(optimizer.init, rows), *numbers)
    step = make_train_step(
        planner.networks.with_gradient_checkpointing("policy"), optimizer, batch_size=2, accumulation=1,
        num_devices=1, axis_name=AXIS,
    )  # fmt: skip
    traced = make_run_steps(step, planner.mesh, 1).trace(planner._frozen(), state, numbers[0])
    assert precisions(traced, platform) == {precision}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "")])
def test_drawing(tiny_sd, dtype, precision, platform):
    sd = StableDiffusion.from_pretrained(tiny_sd, dtype=dtype)
    ids = sd.tokenize(["a portrait"])
    traced = sampling._draw_batch.trace(
        sd.networks, sd.params, make_sampler("ddim", sd.scheduler_config, 2), ids, ids, None,
        np.zeros(1, np.uint32), jnp.float32(3), latent_shape=(8, 8, 4), guided=True,
    )  # fmt: skip
    assert precisions(traced, platform) == {precision}
    traced = pipeline._run.trace(sd.networks, "encode_image", sd.params, jnp.zeros((1, 16, 16, 3)))
    assert precisions(traced, platform) == {precision}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_scores_and_verifies(tiny_sd, platform):
    """The judge, CLIP and the text encoders of the tools have float32 alone."""
    toy = judge.Judge.load(StableDiffusion.from_pretrained().path)
    side = toy.config.side
    traced = judge._read.trace(toy.config, toy.params, jnp.zeros((1, side, side, 3)))
    assert precisions(traced, platform) == {"HIGHEST"}

    encoders = text_encoders.TextEncoders.from_pretrained(str(tiny_sd))
    module, params = encoders.modules["text_encoder"], encoders.params["text_encoder"]
    traced = text_encoders._encode.trace(module, params, jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 32)))
    assert precisions(traced, platform) == {"HIGHEST"}

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text, vision = CLIPTextConfig(vocab_size=60, **sizes), CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    model = CLIPModel(text, vision, 24)
    pixels = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    params = param_shapes(model, pixels, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    traced = clip._run.trace(model, "image_features", params, pixels)
    assert precisions(traced, platform) == {"HIGHEST"}


def test_a_tpus_attention_kernels():
    """They are programs of their own: three, one forward and two backward."""

    def gradient(*inputs):
        with exact_products(jnp.float32):
            return jax.grad(lambda *inputs: flash_attention(*inputs).sum(), argnums=(0, 1, 2))(*inputs)

    text = str(jax.make_jaxpr(gradient)(*[jnp.zeros((1, 1024, 1, 8))] * 3))
    assert len(re.findall(r"= pallas_call", text)) == 3
    assert len(re.findall(r"= dot_general", text)) == len(re.findall("precision=.*HIGHEST", text)) >= 7
