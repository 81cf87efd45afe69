"""Float32 means float32 products on every platform, and not a TPU's bfloat16 or a GPU's TF32."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ti_jax.diffusion.samplers import make_sampler
from ti_jax.evaluation import avatar_judge, clip
from ti_jax.models.clip_text import CLIPTextConfig
from ti_jax.models.clip_vision import CLIPModel, CLIPVisionConfig
from ti_jax.models.shapes import param_shapes
from ti_jax.ops.attention import flash_attention
from ti_jax.ops.matmul import exact_products
from ti_jax.ops.platform import Platform, compiling_for
from ti_jax.pipeline import StableDiffusion, sampling
from ti_jax.text import text_encoders
from ti_jax.training.optimizer import make_optimizer
from ti_jax.training.parallel import AXIS, make_run_steps
from ti_jax.training.plan import PlanConfig, Planner, resolve_plan
from ti_jax.training.step import TrainState, make_train_step

PLATFORMS = {"tpu": Platform("tpu"), "cuda": Platform("cuda", 9)}


@pytest.fixture(autouse=True)
def _with_a_gpu(asked_of_a_gpu):
    asked_of_a_gpu(9)


def precisions(function, *arguments, platform, **options):
    """Of every product and convolution in a program, traced and lowered for a platform: its precision, or ""."""
    with compiling_for(PLATFORMS[platform]):
        # Made here: one that was traced before would come from JAX's memory, in the forms of another platform.
        traced = jax.jit(partial(function, **options)).trace(*arguments)
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
    networks = planner.networks.compiled_for(PLATFORMS[platform]).with_gradient_checkpointing("policy")
    step = make_train_step(networks, optimizer, batch_size=2, accumulation=1, num_devices=1, axis_name=AXIS)
    run_steps = make_run_steps(step, planner.mesh, 1).__wrapped__
    assert precisions(run_steps, planner._frozen(), state, numbers[0], platform=platform) == {precision}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "")])
def test_drawing(tiny_sd, dtype, precision, platform):
    sd = StableDiffusion.from_pretrained(tiny_sd, dtype=dtype)
    ids = sd.tokenize(["a portrait"])
    draw = partial(sampling._draw_batch.__wrapped__, sd.networks, latent_shape=(8, 8, 4), guided=True)
    assert precisions(
        draw, sd.params, make_sampler("ddim", sd.scheduler_config, 2), ids, ids, None, np.zeros(1, np.uint32),
        jnp.float32(3), platform=platform,
    ) == {precision}  # fmt: skip
    assert precisions(sd.networks.encode_image, sd.params, jnp.zeros((1, 16, 16, 3)), platform=platform) == {precision}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_scores_and_verifies(tiny_sd, platform):
    """The judge, CLIP and the text encoders of the tools have float32 alone."""
    toy = avatar_judge.Judge.load(StableDiffusion.from_pretrained().path)
    side = toy.config.side
    read = partial(avatar_judge._read.__wrapped__, toy.config)
    assert precisions(read, toy.params, jnp.zeros((1, side, side, 3)), platform=platform) == {"HIGHEST"}

    encoders = text_encoders.TextEncoders.from_pretrained(str(tiny_sd))
    module, params = encoders.modules["text_encoder"], encoders.params["text_encoder"]
    encode = partial(text_encoders.encode.__wrapped__, module)
    ids, rows = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 32))
    assert precisions(encode, params, ids, rows, platform=platform) == {"HIGHEST"}

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text, vision = CLIPTextConfig(vocab_size=60, **sizes), CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    model = CLIPModel(text, vision, 24)
    pixels = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    params = param_shapes(model, pixels, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    run = partial(clip._run.__wrapped__, model, "image_features")
    assert precisions(run, params, pixels, platform=platform) == {"HIGHEST"}


def test_a_tpus_attention_kernels():
    """They are programs of their own: three, one forward and two backward."""

    def gradient(*inputs):
        with exact_products(jnp.float32):
            return jax.grad(lambda *inputs: flash_attention(*inputs).sum(), argnums=(0, 1, 2))(*inputs)

    text = str(jax.make_jaxpr(gradient)(*[jnp.zeros((1, 1024, 1, 8))] * 3))
    assert len(re.findall(r"= pallas_call", text)) == 3
    assert len(re.findall(r"= dot_general", text)) == len(re.findall("precision=.*HIGHEST", text)) >= 7
