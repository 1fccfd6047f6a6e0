"""The notebooks run from top to bottom, and show what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_notebooks_say_how_to_open_them_and_hold_no_outputs():
    assert len(NOTEBOOKS) >= 6
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        assert f"jupyter lab notebooks/{notebook.name}" in "".join(cells[0]["source"])
        assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    """From top to bottom; each asserts what it shows."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "assert " in code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
