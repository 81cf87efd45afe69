"""The notebook runs from its first cell to its last, as Colab and Kaggle run it: in a kernel of its own."""

import os
from pathlib import Path

import pytest
from conftest import NO_OPTIMISATIONS

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "ti_jax.ipynb"
# What a user may write into the cell of settings; few steps, for this shows that it runs.
SMALL = f"""
STEPS = 8
PICTURES = {str(ROOT / "ti_jax" / "assets" / "concepts" / "ana")!r}
MODEL = None
WORD, INITIALIZER = "<ana>", "person"
"""


@pytest.mark.notebook
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, which runs it, and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "it is kept without what it printed"
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += SMALL
    for name in ("XLA_FLAGS", NO_OPTIMISATIONS):  # as a user's kernel: not compiled as tests are, not on eight devices
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    run = tmp_path / "output" / "own"
    assert (tmp_path / "word.zip").exists() and (run / "learned_embeds.safetensors").exists()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == 6  # two overviews, four prompts
    assert any("<iframe" in "".join(output.get("data", {}).get("text/html", "")) for output in shown)
    assert not [output for output in shown if output.output_type == "error"]
