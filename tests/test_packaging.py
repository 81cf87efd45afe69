"""What is built from the source: the wheel has all that the package reads, the sdist all that the tests need."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

import ti_jax
from ti_jax.cli.main import main
from ti_jax.config import ASSETS, config_path

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def builders():
    """hatchling's, which say what they would pack without packing it."""
    pytest.importorskip("hatchling", reason="needs hatchling, which builds")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    return WheelBuilder(str(ROOT)), SdistBuilder(str(ROOT))


def packed(builder):
    return {file.distribution_path.replace("\\", "/") for file in builder.recurse_included_files()}


def test_the_wheel_has_the_package_with_its_assets(builders):
    wheel, _ = builders
    package = ASSETS.parent
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    found = packed(wheel)
    assert found == files
    assert {"ti_jax/py.typed", "ti_jax/assets/mini-sd/unet/diffusion_pytorch_model.safetensors"} <= found
    assert {"ti_jax/assets/demo.yaml", "ti_jax/assets/sd15.yaml", "ti_jax/assets/concepts/cleo/0.png"} <= found
    # PyPI takes 100 MB.
    assert sum((ROOT / name).stat().st_size for name in found) < 60e6


def test_the_sdist_has_what_the_tests_and_recipes_need(builders):
    _, sdist = builders
    found = packed(sdist)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0 and tracked.stdout:
        there = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
        assert there <= found, "a fresh clone can do no more than the sdist"
    assert {"train.py", "infer.py", "configs/sd15.yaml", "tests/conftest.py", "LICENSE", "NOTICE"} <= found


def test_metadata(builders):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ti_jax.__version__
    wheel, _ = builders
    assert wheel.metadata.core.classifiers == sorted(project["classifiers"]), "hatchling knows them all"
    assert project["scripts"] == {"ti-jax": "ti_jax.__main__:run"}
    packages = set(project["optional-dependencies"])
    assert {"gcs", "tpu", "cuda12", "cuda13", "test"} <= packages


def test_configs_that_come_with_the_wheel(tmp_path, monkeypatch, capsys):
    """As in a checkout, where they are under the same names: README's commands are right in any folder."""
    for name in ("demo", "sd15", "sd21", "sdxl"):
        assert os.path.samefile(ROOT / "configs" / f"{name}.yaml", ASSETS / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    assert config_path("configs/sd15.yaml") == config_path("sd15") == ASSETS / "sd15.yaml"
    assert config_path("configs/none.yaml") == "configs/none.yaml" and config_path("sd15.yaml") == "sd15.yaml"
    (tmp_path / "sd15").write_text("seed: 5\n")
    assert config_path("sd15") == "sd15", "a file of the user's own comes first"
    assert main(["train", "--config", "configs/sd15.yaml"]) == 2
    assert "--train_data_dir and --placeholder_token" in capsys.readouterr().err
