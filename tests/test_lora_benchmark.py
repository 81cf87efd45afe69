"""`benchmarks/lora.py` in small: a LoRA is trained, added to the weights, measured once, and its tables are right."""

import importlib
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from ti_jax import StableDiffusion
from ti_jax.weights.reference_configs import SD15

ROOT = Path(__file__).parent.parent
PATHS = [str(ROOT / "benchmarks"), str(ROOT / "recipes" / "mini_sd")]
NAMES = ("lora", "lora_tables", "lora_page", "torch_lora", "torch_loops", "learning", "subjects", "world", "styles")


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules, which lie beside each other and not in a package."""
    pytest.importorskip("peft", reason="needs peft, which trains LoRAs")
    kept = list(sys.path)
    sys.path[:0] = PATHS
    try:
        names = ("lora", "lora_tables", "lora_page", "torch_lora")
        yield type("Bench", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = kept
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def trained(bench, tiny_sd, tmp_path_factory):
    """Two LoRAs after a few steps, the second with a part of the text encoder: loops and files."""
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    loops, files = [], []
    for seed, parts in enumerate((("unet",), ("unet", "text_encoder"))):
        loop = bench.torch_lora.LoraLoop(
            Path(tiny_sd),
            pixels,
            ["a portrait of {}"],
            "in",
            "",
            learning_rate=1e-2,
            batch_size=2,
            seed=seed,
            parts=parts,
        )
        loop.run(3)
        loops.append(loop)
        files.append(tmp_path_factory.mktemp("lora") / "some.safetensors")
        loop.save(files[-1])
    return loops, files


def answer(networks, ids):
    """The noise that PyTorch networks predict for a prompt."""
    latents = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    with torch.no_grad():
        context = networks["text_encoder"](ids)[0]
        return networks["unet"](latents, torch.tensor([500]), context).sample


def networks_of(folder):
    return {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval(),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
    }


@pytest.mark.heavy
def test_a_merged_model_draws_as_the_trained_one_and_as_diffusers_with_the_file(bench, trained, tiny_sd, tmp_path):
    for number, (loop, file) in enumerate(zip(*trained, strict=True)):
        ids = loop.tokenize(["a portrait of in"])["text_encoder"]
        folder = tmp_path / str(number)
        bench.torch_lora.write_merged(Path(tiny_sd), [file], folder)
        wanted = answer({"unet": loop.unet, **loop.text_encoders}, ids)
        plain = answer(networks_of(Path(tiny_sd)), ids)
        assert (wanted - plain).abs().max() > 0.01, "something was learned"
        np.testing.assert_allclose(answer(networks_of(folder), ids), wanted, atol=1e-4)
        sd = StableDiffusion.from_pretrained(folder)
        latents = np.linspace(-1, 1, 4 * 8 * 8, dtype=np.float32).reshape(1, 4, 8, 8).transpose(0, 2, 3, 1)
        ours = sd.predict_noise(latents, np.array([500]), sd.encode_text({"text_encoder": ids.numpy()}))
        np.testing.assert_allclose(ours, wanted.permute(0, 2, 3, 1), atol=1e-4)
    loop, file = trained[0][0], trained[1][0]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    ids = loop.tokenize(["a portrait of in"])["text_encoder"]
    wanted = answer({"unet": loop.unet, **loop.text_encoders}, ids)
    np.testing.assert_allclose(answer(networks, ids), wanted, atol=1e-4)


def test_loras_add_up_and_change_nothing_but_attention(bench, trained, tiny_sd, tmp_path):
    _, files = trained
    for name, which in (("one", files[:1]), ("two", files[1:]), ("both", files)):
        bench.torch_lora.write_merged(Path(tiny_sd), which, tmp_path / name)
    for part in ("unet", "text_encoder"):
        plain, one, two, both = (
            networks_of(folder)[part].state_dict()
            for folder in (Path(tiny_sd), *map(tmp_path.joinpath, ("one", "two", "both")))
        )
        assert plain.keys() == both.keys()
        changed = {name for name in plain if not torch.equal(plain[name], both[name])}
        ends = tuple(f"{target}.weight" for target in bench.torch_lora.TARGETS[part])
        assert changed == {name for name in plain if name.endswith(ends) and "attn" in name}
        for name in changed:
            np.testing.assert_allclose(one[name] + two[name] - plain[name], both[name], atol=1e-6)
            assert np.linalg.matrix_rank((one[name] - plain[name]).numpy(), tol=1e-5) == (4 if part == "unet" else 0)


def test_a_loop_learns_with_one_token_that_is_there(bench, trained, tiny_sd):
    with pytest.raises(ValueError, match="sunglassess: 7 tokens of text_encoder, not one"):
        bench.torch_lora.LoraLoop(Path(tiny_sd), torch.zeros(1, 3, 16, 16), ["{}"], "sunglassess", "")
    table = trained[0][1].text_encoders["text_encoder"].get_input_embeddings().weight
    before = transformers.CLIPTextModel.from_pretrained(Path(tiny_sd) / "text_encoder").get_input_embeddings().weight
    assert torch.equal(table, before)


def test_the_same_seed_trains_the_same_lora(bench, trained, tiny_sd, tmp_path):
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    np.save(tmp_path / "pixels.npy", pixels)
    settings = dict(
        model=tiny_sd, templates=["a portrait of {}"], token="in", initializer="", learning_rate=1e-2, batch_size=2,
        seed=0, parts=["unet"],
    )  # fmt: skip
    torch.manual_seed(5)
    again = bench.torch_lora.learn("LoraLoop", str(tmp_path / "pixels.npy"), 3, settings)
    found = load_file(trained[1][0])
    assert found.keys() == again.trained.keys()
    assert all(torch.equal(found[name], again.trained[name]) for name in found)


def test_numbers_of_stable_diffusion(bench):
    """As they are known: 859.5M in the UNet of SD1.5, 797,184 in its LoRA at rank 4, 3.2 MB."""
    configs = {part: dict(SD15[part]) for part in ("unet", "text_encoder")}
    found = bench.torch_lora.numbers(configs)
    assert found["unet"] == (859_520_964, 797_184)
    assert found["text_encoder"][1] == 12 * 4 * 2 * 4 * 768


# -- tables


TRUTH = {"hair": "bob hair", "hair_colour": "red", "skin": "tan", "beard": "no beard", "nose": "wrinkles"}


def person(bench, name, is_style=False, **changes):
    found = bench.lora.Person(name, Path(name), TRUTH | changes)
    assert found.is_style == is_style
    return found


def readings(truth, count, wrong=0):
    """Pictures that show everything, but for the hair of the first `wrong`."""
    return [truth | ({"hair": "bald"} if number < wrong else {}) for number in range(count)]


def line(method, name, **more):
    common = {"what": "concept", "method": method, "person": name, "seed": 0, "cores": 1, "changes": {}}
    return common | ({"changes": {"learning_rate": 1e-3}} if method.startswith("lora") else {}) | more


def test_a_word_has_the_other_prompts_of_the_plain_model(bench):
    judge = bench.lora.Judge.load(ROOT / "ti_jax" / "assets" / "mini-sd")
    everyone = [person(bench, "ana"), person(bench, "ben", hair="fade")]
    seen = {name: words[0] for name, words in judge.config.attributes}
    count = 4 * len(judge.config.probes)
    lines = []
    for who in everyone:
        right, nobody = (readings({**seen, **who.truth, **more}, count) for more in ({}, {"skin": "dark"}))
        lines += [
            line("plain", who.name, readings=nobody, others=0.75, levels=0.0),
            line("ours", who.name, readings=right, seconds=2.0, bytes=1000),
            line("lora", who.name, readings=readings({**seen, **who.truth}, count, count // 2), seconds=8.0, bytes=9000,
                 others=0.5, levels=12.0, anyone=right),
        ]  # fmt: skip
    rows = list(bench.lora_tables.concept_table(lines, everyone, judge))
    cells = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ") for row in rows[2:5]}
    assert rows[0] == "| method | runs | identity | editability | others | levels | anyone | seconds | kB |"
    assert cells["plain"][1:3] + cells["plain"][4:7] == ["2", "0.80 ± 0.00", "0.75", "0.0", "0.80"]
    assert cells["ours"][1:3] + cells["ours"][4:] == ["2", "1.00 ± 0.00", "0.75", "0.0", "0.80", "2.0", "1.0"]
    name = "lora learning_rate=0.001"
    assert cells[name][1:3] + cells[name][4:] == ["2", "0.90 ± 0.00", "0.50", "12.0", "1.00", "8.0", "9.0"]
    assert f"{name} - ours, identity: -0.100 ± 0.000 (standard error, 2 pairs)" in rows


def test_of_two_people_counts_where_they_differ(bench):
    first, second = person(bench, "ana"), person(bench, "ben", hair="fade", skin="dark")
    pairs = bench.lora.pairs_of([first, second], [])
    assert pairs == {"ana+ben": (first, second)}
    assert bench.lora_tables.told_apart(pairs["ana+ben"]) == (
        {"hair": "bob hair", "skin": "tan"},
        {"hair": "fade", "skin": "dark"},
    )
    alone = [
        line(method, who.name, readings=readings(who.truth, 4))
        for method in ("ours", "lora")
        for who in (first, second)
    ]
    # Another rate's line is not the one to compare with.
    alone.append(line("lora", "ana", readings=readings(second.truth, 4), changes={"learning_rate": 1e-2}))
    both = [
        line("ours", "ana+ben", readings=readings(first.truth, 4, wrong=2)),
        line("lora", "ana+ben", readings=readings(second.truth, 4), first=readings(first.truth, 4, wrong=4)),
    ]
    rows = list(bench.lora_tables.pair_table(both, alone, pairs))
    assert rows[2:] == [
        "| two people | ours | 1 | 0.75 | 0.00 | 0.25 | 1.00 | 1.00 | 1.00 |",
        "| two people | lora learning_rate=0.001 | 1 | 0.00 | 1.00 | 0.00 | 0.50 | 1.00 | 1.00 |",
    ]


# -- the commands


@pytest.mark.slow  # JAX and PyTorch with the embedded model in one process: a gigabyte
def test_the_benchmark_measures_once_and_draws_its_page(bench, tmp_path, monkeypatch, capsys):
    """Two updates of one person on the embedded model, pictures of one sampler step."""
    monkeypatch.setattr(bench.lora, "INFERENCE_STEPS", 1)
    results = tmp_path / "lora.jsonl"

    def run(*more):
        command = [
            "lora.py",
            "--results",
            str(results),
            "--steps",
            "2",
            "--people",
            "ana",
            "--methods",
            "plain",
            "lora",
        ]
        monkeypatch.setattr(sys, "argv", [*command, *more])
        bench.lora.main()
        return capsys.readouterr().out

    assert "| lora learning_rate=" in run()
    found = [json.loads(each) for each in results.read_text().splitlines()]
    assert [each["method"] for each in found] == ["plain", "lora"] and {each["steps"] for each in found} == {2}
    assert found[0]["levels"] == 0 < found[1]["levels"] < 20 and 300e3 < found[1]["bytes"] < 320e3
    assert len(found[1]["readings"]) == len(found[1]["anyone"]) == 32
    drawn = sorted((tmp_path / "lora").rglob("*.png"))
    assert [path.name for path in drawn] == [
        "ana-lora-others.png",
        "ana-lora.png",
        "ana-plain-others.png",
        "ana-plain.png",
    ]
    before = results.read_text()
    assert "concept, " not in run() and results.read_text() == before
    assert "| two people |" not in run("--table")
    sheet = bench.lora_page.sheet(drawn[0].parent, [bench.lora.people("dev")[0]])
    sheet_file = tmp_path / "sheet.png"
    bench.lora_page.save_small(sheet, sheet_file)
    assert sheet_file.stat().st_size < bench.lora_page.LIMIT and sheet.width > 8 * 64


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--split", "nobody"), "--split nobody: there is nobody in it"),
        (("--model", "nowhere"), "--model nowhere: not a folder"),
    ],
)
def test_what_is_not_there_is_one_line(bench, monkeypatch, capsys, tmp_path, wrong, said):
    monkeypatch.setattr(sys, "argv", ["lora.py", "--results", str(tmp_path / "lora.jsonl"), *wrong])
    with pytest.raises(SystemExit) as stopped:
        bench.lora.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_the_figure_says_what_each_has(bench):
    drawn = bench.lora_page.figure(ROOT / "ti_jax" / "assets" / "mini-sd").as_svg()
    assert "71,680" in drawn and "24,576" in drawn and ">192" in drawn
