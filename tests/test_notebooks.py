"""The notebooks run from top to bottom, and what they show is learned and not collapsed."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_notebooks_say_how_to_open_them_and_hold_no_outputs():
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        assert f"jupyter lab notebooks/{notebook.name}" in "".join(cells[0]["source"])
        assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    entropy, uniform = map(float, re.search(r"entropy of the teacher: ([\d.]+), of a uniform answer ([\d.]+)", done.stdout).groups())
    trained, untrained = map(float, re.search(r"trained, k-NN accuracy: ([\d.]+), untrained ([\d.]+)", done.stdout).groups())
    assert untrained < 0.65 and trained > untrained + 0.2, "which hue an object has, never named"
    assert 0.5 < entropy < 0.6 * math.log(256) and uniform == pytest.approx(math.log(256), abs=0.01)
