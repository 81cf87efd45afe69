"""``ti-jax plan``: what it reads off a compiled step is what the step has."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from test_full_size import TEXT_ENCODERS, UNETS, VAES

from ti_jax.cli.main import main
from ti_jax.config import PlanConfig, resolve_plan
from ti_jax.errors import InputError
from ti_jax.models.clip_text import CLIPTextConfig
from ti_jax.models.networks import make_networks
from ti_jax.models.unet import UNetConfig
from ti_jax.models.vae import VAEConfig
from ti_jax.pipeline import StableDiffusion
from ti_jax.training import gpus
from ti_jax.training.chips import CHIPS
from ti_jax.training.plan import Plan, Planner, crossing_bytes, plan
from ti_jax.weights.reference_configs import PUBLISHED, SD15, SD21, SDXL

SIZES = [
    (SD15, {"text_encoder": "ViT-L"}, "sd1.5"),
    (SD21, {"text_encoder": "ViT-H"}, "sd2.1"),
    (SDXL, {"text_encoder": "ViT-L", "text_encoder_2": "bigG"}, "sdxl"),
]


@pytest.mark.parametrize(("configs", "encoders", "unet"), SIZES)
def test_published_sizes(configs, encoders, unet):
    """The networks are those whose every shape test_full_size holds to diffusers'."""
    networks = make_networks(configs, jnp.bfloat16)
    assert networks.unet.config == UNetConfig.from_dict(UNETS[unet])
    vae = VAEConfig.from_dict(VAES.get(unet, VAES["sd1.5"]))
    assert networks.vae.config == replace(vae, sample_size=networks.vae.config.sample_size)
    assert {name for name, _ in networks.text_encoders} == encoders.keys()
    for name, module in networks.text_encoders:
        published = CLIPTextConfig.from_dict(TEXT_ENCODERS[encoders[name]])
        assert module.config == replace(published, eos_token_id=module.config.eos_token_id)


def test_the_shipped_configs_name_published_models():
    configs = Path(__file__).parent.parent / "configs"
    for name in ("sd15", "sd21", "sdxl"):
        assert yaml.safe_load((configs / f"{name}.yaml").read_text())["pretrained_model_name_or_path"] in PUBLISHED


@pytest.fixture(scope="module")
def config(tiny_sd):
    return PlanConfig(
        pretrained_model_name_or_path=str(tiny_sd), train_batch_size=1, gradient_accumulation_steps=2, num_vectors=3
    )


@pytest.fixture(scope="module")
def tiny(config):
    return plan(config)


def test_memory_holds_the_weights_that_the_step_reads(tiny, tiny_sd):
    params = StableDiffusion.from_pretrained(tiny_sd).params
    weights = sum(leaf.nbytes for name in ("text_encoder", "unet") for leaf in jax.tree.leaves(params[name]))
    # Beside them lie the pictures' moments, prompts and schedule.
    assert weights < tiny.arguments < weights + 2e5
    assert tiny.temporary > 1e5
    assert tiny.peak_memory == tiny.arguments + tiny.temporary + tiny.code


def test_only_rows_and_scalars_cross_devices(tiny):
    rows = 3 * 32 * 4
    assert jax.device_count() == 8
    assert tiny.samples == 16
    assert set(tiny.crossing) == {"all-reduce"}
    assert rows < tiny.crossing["all-reduce"] <= rows + 16


def test_the_rows_of_all_concepts_are_planned(config, tmp_path):
    """Without compiling: rows, prompts and pictures of three, and what crosses is as large as the rows."""
    file = tmp_path / "ours.yaml"
    file.write_text("".join(f"- train_data_dir: d{name}\n  num_vectors: {name}\n" for name in "123"))
    planner = Planner(replace(config, concepts=str(file)), np.float32, jax.devices()[:1])
    frozen, one = planner._frozen(), Planner(config, np.float32, jax.devices()[:1])._frozen()
    assert frozen.row_mask["text_encoder"].shape == planner._rows()["text_encoder"].shape[:1] == (6,)
    for name in ("moments", "entries", "prompts_of", "time_ids"):
        assert getattr(frozen.dataset, name).shape[0] == 3 * getattr(one.dataset, name).shape[0]
    assert frozen.dataset.ids["text_encoder"].shape[0] == 3 * one.dataset.ids["text_encoder"].shape[0]
    assert frozen.dataset.sharing.start.shape == (3,) and one.dataset.sharing is None


def test_moments_that_stay_on_the_host_are_planned_as_windows(config, tiny, tmp_path, monkeypatch):
    """On a device that has little memory; the pictures of a folder are counted, not read."""
    for number in range(500):
        (tmp_path / f"{number}.png").touch()
    config = replace(config, train_data_dir=str(tmp_path))
    planner = Planner(resolve_plan(config), np.float32)
    assert planner._frozen().dataset.moments.shape == (500, 2, 8, 8, 8)
    monkeypatch.setattr("ti_jax.training.plan.feeds", lambda datasets, mesh, free: True)
    planner.memory = 1e9
    fed = planner.at(1)
    # In place of the moments of four there are three windows of ten updates, two samples each (two micro-steps of one);
    # and 496 pictures more.
    windows, moments = 3 * 10 * 2 * (8 * 8 * 8 * 4 + 2 * 4), 4 * 2 * 8 * 8 * 8 * 4
    prompts, sizes = 496 * 4 * planner._frozen().dataset.prompts_of.shape[1], 496 * 4 * 2 * 6
    entries = 500 * 4  # which the program needs no more
    change = fed.arguments - tiny.arguments - (windows - moments + prompts)
    # Only SDXL looks at the sizes: JAX 0.12 leaves them out of the program, JAX 0.10 does not.
    assert min(abs(change - sizes), abs(change)) <= entries
    assert "without the moments of 500 pictures, which stay on the host" in "\n".join(fed.lines())
    assert fed.least_flops == tiny.least_flops


def test_the_published_step_of_stable_diffusion_needs_what_is_known_of_it():
    config = resolve_plan(PlanConfig(pretrained_model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5"))
    planner = Planner(config, jnp.bfloat16, jax.devices()[:1])
    # 44 ms at 308 TFLOP/s for a batch of 8, products with the zeros around a picture among them.
    np.testing.assert_allclose(planner.least_flops(8), 308e12 * 0.044, rtol=0.03)


def test_transfers_are_found_in_a_program():
    program = """
      %all-reduce.1 = (f32[2,768]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1
      %gather = bf16[8,4]{1,0} all-gather-start(bf16[1,4] %c), dimensions={0}
      ROOT %done = bf16[8,4]{1,0} all-gather-done(%gather)
    """
    assert crossing_bytes(program) == {"all-reduce": 2 * 768 * 4 + 4, "all-gather": 8 * 4 * 2}


def test_the_command_tells_it(capsys, tiny_sd):
    flags = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--num_vectors", "3"]
    assert main(["plan", "--pretrained_model_name_or_path", str(tiny_sd), *flags]) == 0
    out = capsys.readouterr().out
    assert f"{tiny_sd}: 1 per device on 8 x cpu, float32, 16 px, 16 samples per update" in out
    assert "TFLOP per update and device\n" in out
    assert "GB with --gradient_checkpointing none\n" in out


@pytest.mark.parametrize("first", [1, 4, 32])
@pytest.mark.parametrize(("each", "most"), [(10, 5), (10, 1), (10, 40), (3, 7), (200, 0)])
def test_the_largest_batch_for_memory_that_goes_up_with_it(config, each, most, first):
    class Linear(Planner):
        def plan_of(self, batch):
            return Plan("", "", batch, 0, 100, each * batch, 0, self.memory, 1.0, 1.0, {}, None)

        def at(self, batch):
            found = self.plan_of(batch)
            return None if found.peak_memory > 2 * self.memory else found  # beyond that the compiler gives up

    planner = Linear(resolve_plan(config), jnp.float32)
    planner.memory = 100 + each * most + each / 2
    assert planner.largest(planner.plan_of(first)) == most


@pytest.mark.slow
def test_a_batch_is_looked_for(monkeypatch, config):
    def peak(batch):
        return plan(replace(config, train_batch_size=batch)).peak_memory

    memory = (peak(5) + peak(6)) / 2
    monkeypatch.setattr("ti_jax.training.plan.Planner._memory_for_the_step", lambda *_: memory)
    config = replace(config, gradient_checkpointing="none")
    assert plan(replace(config, train_batch_size=1, largest_batch=True)).largest_batch == 5


def test_without_libtpu_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as if it were not installed
    assert main(["plan", "--topology", "v5e:2x2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pip install 'ti_jax[plan]'" in err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[plan]'")
def test_for_a_tpu_slice():
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "ti_jax", "plan", "--topology", "v5e:2x2"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert "mini-sd: 8 per device on 4 x TPU v5e, bfloat16, 64 px, 32 samples per update" in done.stdout
    assert "all-reduce 0.8 kB per update" in done.stdout
    # Not more work than there is, as counted on the traced function; XLA counts element-wise work, too.
    assert 0.98 <= float(re.search(r"compiled: ([\d.]+) times that", done.stdout)[1]) < 1.5


def test_where_the_compiler_does_not_count_all_the_least_work_is_the_estimate():
    """As with kernels on TPU, into which XLA does not look."""
    known = Plan("sd", "1 x TPU v5e", 4, 4, 1, 1, 1, None, 2e12, 1e12, {}, peak=100e12)
    counted, uncounted = ("\n".join(plan.lines()) for plan in (known, replace(known, flops=None)))
    assert "compiled: 2.00 times that" in counted and "20.0 ms per update at the published peak" in counted
    assert "compiled" not in uncounted and "10.0 ms per update at the published peak" in uncounted


@pytest.mark.parametrize(
    ("topology", "wanted"),
    [
        ("h100", "--topology h100: it is written NAME:COUNT, for example h100:1"),
        ("h100:0", "--topology h100:0: it is written NAME:COUNT"),
        ("h100:two", "--topology h100:two: it is written NAME:COUNT"),
        (
            "gtx1080:1",
            "--topology gtx1080:1: no such device; known GPUs are a100, a100-40gb, a6000, rtx3090, rtx4090, l4,",
        ),
        ("2x2", "--topology 2x2: no such device; known GPUs are"),
    ],
)
def test_a_gpu_that_is_not_known_or_not_counted_is_one_line(capsys, topology, wanted):
    assert main(["plan", "--topology", topology]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"ti-jax: error: {wanted}")


def test_gpus_and_tpu_slices_are_told_apart():
    assert not any(gpus.is_gpu(name) for name in ("v5e:2x4", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1"))
    assert all(gpus.is_gpu(name) for name in (*gpus.CARDS, "rtx4090:8"))
    assert gpus.parse("RTX4090:8") == (gpus.CARDS["rtx4090"], 8)
    assert all(
        CHIPS[card.kind].memory * 0.95 < card.memory < CHIPS[card.kind].memory * 1.08 for card in gpus.CARDS.values()
    )


def test_without_the_compiler_for_gpus_one_line(capsys, monkeypatch):
    monkeypatch.setattr(gpus, "installed", lambda module: False)
    assert main(["plan", "--topology", "h100:1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "jax-cuda13-plugin is not installed: pip install 'ti_jax[plan-gpu]'" in err


def test_of_a_gpu_a_run_has_the_share_that_jax_takes(monkeypatch, config):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    card = gpus.CARDS["rtx4090"]
    assert gpus.available(card) == 0.75 * card.memory
    planner = Planner(replace(resolve_plan(config), topology="rtx4090:1"), np.float32, jax.devices()[:1])
    assert planner.memory == pytest.approx(0.75 * 0.95 * card.memory)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert gpus.available(card) == 0.9 * card.memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "all")
    with pytest.raises(InputError, match=r"^XLA_PYTHON_CLIENT_MEM_FRACTION=all: it is a number"):
        gpus.available(card)


def test_jax_is_told_of_the_card_only_while_it_traces():
    from jax._src.cudnn import fused_attention_stablehlo as rules

    names = ("check_cudnn_version", "check_compute_capability", "is_cuda_compute_capability_equal")
    own = [getattr(rules, name) for name in names]
    with pytest.raises(KeyError), gpus.tracing_for(gpus.CARDS["l4"]):
        assert rules.check_compute_capability("8.0") and not rules.check_compute_capability("9.0")
        assert rules.is_cuda_compute_capability_equal("8.9") and rules.check_cudnn_version() == 91200
        raise KeyError
    assert [getattr(rules, name) for name in names] == own
    with gpus.tracing_for(None):
        assert [getattr(rules, name) for name in names] == own


def test_of_an_absent_gpu_no_time_is_told():
    known = Plan("sd", "1 x H100", 8, 8, 1, 1, 1, None, None, 1e12, {}, peak=100e12, tuned=False)
    (time,) = (line for line in known.lines() if line.startswith("  time"))
    assert time.startswith("  time           not known") and "10.0 ms per update at the published peak" in time


def plan_in_a_process(*flags, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "ti_jax", "plan", *flags],
        capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


GPU_COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="pip install -e '.[plan-gpu]'"
)


@GPU_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100:1", "l4:2", "a100:1"])
def test_for_a_gpu_that_is_not_there(tiny_sd, topology):
    flags = ("--pretrained_model_name_or_path", str(tiny_sd), "--train_batch_size", "2", "--topology", topology)
    out = plan_in_a_process(*flags)
    name, count = topology.split(":")
    assert f"2 per device on {count} x {CHIPS[gpus.CARDS[name].kind].name}, bfloat16, 16 px" in out
    assert ("all-reduce" in out) == (count == "2")
    assert "time           not known" in out
