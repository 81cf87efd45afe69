"""Accelerators that are not there, though their packages are: JAX would say so in many lines of errors."""

import os
import subprocess
import sys

import pytest

from ti_jax import startup


@pytest.fixture
def libtpu(tmp_path, monkeypatch):
    """A folder with a package of that name, on this process' path."""
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(startup, "has_tpu", lambda: False)
    monkeypatch.setattr(startup.importlib.metadata, "entry_points", lambda group: [])
    return tmp_path


def platforms():
    startup.avoid_missing_tpu()
    return os.environ.get("JAX_PLATFORMS")


def test_a_tpu_that_is_not_there(libtpu):
    assert platforms() == "cpu"


def test_a_tpu_that_is_there(libtpu, monkeypatch):
    monkeypatch.setattr(startup, "has_tpu", lambda: True)
    assert platforms() is None


def test_what_the_user_asks_for_stays(libtpu, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert platforms() == ""


def test_another_accelerator_is_still_found(libtpu):
    (libtpu / "jax_plugins").mkdir()
    assert platforms() is None


def test_without_libtpu_nothing_is_done(libtpu):
    (libtpu / "libtpu" / "__init__.py").unlink()
    (libtpu / "libtpu").rmdir()
    if startup.installed("libtpu"):
        pytest.skip("libtpu is installed here")
    assert platforms() is None


def test_commands_do_it_before_jax_starts(libtpu):
    program = (
        "import os, sys; from ti_jax.cli.main import main\n"
        "main(['embedding', 'inspect', 'nothing.safetensors'])\n"
        "print(os.environ.get('JAX_PLATFORMS'))"
    )
    path = os.pathsep.join([str(libtpu), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    expected = "None" if startup.installed("jax_plugins") else "cpu"
    assert done.stdout.split()[-1] == expected, done.stderr


def test_a_plugin_without_its_driver_is_one_line(tmp_path):
    """A plug-in as JAX finds it, which fails as CUDA's does where there is no driver."""
    plugin = tmp_path / "jax_plugins" / "xla_mine"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(
        "def initialize():\n    raise RuntimeError('Unable to load cuPTI.\\nIs it there?')\n"
    )
    program = (
        "from ti_jax.cli.main import main\n"
        "main(['embedding', 'inspect', 'nothing.safetensors'])\n"
        "import jax; print(jax.default_backend())"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths}
    environment.pop("JAX_PLATFORMS", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "cpu"
    (said,) = [line for line in done.stderr.splitlines() if "xla_mine" in line]
    assert said.endswith("Unable to load cuPTI. (ti-jax doctor has more)")
    assert "Traceback" not in done.stderr
