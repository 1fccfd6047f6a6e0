"""dino-lightning compare: the same time for each method, what is done stays done, a table and a page."""

import json
import re

import pytest
import yaml
from conftest import two_colours

from dino_lightning.__main__ import main
from dino_lightning.tools.compare import compare
from dino_lightning.tools.comparison_page import Result, as_markdown, as_page

RESULTS = [
    Result("simclr", 0.5, 0.6, 12.3, 410.0, 900.4, 1.94, [(0.0, 0.3), (5.0, 0.45), (10.0, 0.5)]),
    Result("a<b", 0.7, 0.65, 40.0, 200.0, 800.0, 2.7, [(0.0, 0.3), (10.0, 0.7)]),
]


def test_the_table_has_the_best_first():
    rows = as_markdown(RESULTS).splitlines()
    assert rows[2] == "| a<b | 70.0 | 65.0 | 40 | 200 | 800 | 2.7 |" and rows[3].startswith("| simclr | 50.0 |")


def test_the_page_needs_nothing_but_itself():
    text = as_page("8 images & more", RESULTS)
    assert "8 images &amp; more" in text and "<td>a&lt;b</td>" in text and "src=" not in text and "href=" not in text
    lines = [[tuple(map(float, point.split(","))) for point in found.split()] for found in re.findall(r'points="([^"]+)"', text)]
    assert [len(line) for line in lines] == [2, 3]
    best, other = lines
    assert best[0] == other[0] and best[-1][0] == other[-1][0], "from one point, over the same time"
    assert best[-1][1] < other[-1][1] < other[0][1], "y grows downwards in SVG"


def test_refused(tmp_path):
    root = str(two_colours(tmp_path / "images"))
    with pytest.raises(ValueError, match="there is no method 'swav'"):
        compare(root, methods=("swav",))
    with pytest.raises(ValueError, match="got .* and 0"):
        compare(root, minutes=0.0)
    with pytest.raises(ValueError, match="batch_size=128 is more than the 16 images"):
        compare(root, batch_size=128)


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    root = two_colours(tmp_path / "images", counts=(16, 8))
    monkeypatch.chdir(tmp_path)
    command = ["compare", "--root", str(root), "--methods", "byol,dinov2", "--minutes", "0.3", "--batch_size", "8", "--num_workers", "0"]
    main([*command, "--image_size", "16"])
    results = {method: json.loads((tmp_path / f"comparison/{method}/result.json").read_text()) for method in ("byol", "dinov2")}
    for method, result in results.items():
        assert result["method"] == method and 0.4 <= result["knn"] <= 1 and 0.4 <= result["linear"] <= 1
        assert result["megabytes"] > 100 and result["parameters"] == pytest.approx(1.94, abs=0.01) and result["images_per_s"] > 1
        config = yaml.safe_load(next((tmp_path / f"comparison/{method}/log").glob("*/config.yaml")).read_text())
        epochs, every = config["trainer"]["max_epochs"], config["trainer"]["check_val_every_n_epoch"]
        assert result["curve"][-1][0] == pytest.approx(0.3) and epochs % every == 0
        assert len(result["curve"]) == 1 + epochs // every >= 6, "before the first step and at each validation that there was time for"
        assert config["data"]["local_crops_number"] == 0 and config["data"]["global_crops_size"] == 16
    assert (tmp_path / "comparison/index.html").exists() and "| byol |" in (tmp_path / "comparison/comparison.md").read_text()
    (tmp_path / "comparison/dinov2/result.json").unlink()
    capsys.readouterr()
    main([*command, "--image_size", "16"])
    assert "byol (1 of 2)" not in capsys.readouterr().out, "what is done is not done again"
    again = json.loads((tmp_path / "comparison/dinov2/result.json").read_text())
    assert again["knn"] == results["dinov2"]["knn"], "it went on from its last step, where nothing is left to train"
