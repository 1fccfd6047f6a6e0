"""What SECURITY.md says: neither checkpoints, nor images, nor a slip in a config run code."""

import ast
from pathlib import Path

import pytest
import torch

import dino_lightning
from dino_lightning.__main__ import main
from dino_lightning.tools.checkpoint import load_module

PACKAGE = Path(dino_lightning.__file__).parent
FORBIDDEN = ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "os.system", ".extractall", ".extract", ".unpack_archive")


def calls(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_nothing_in_the_package_runs_what_it_reads():
    for file in set(PACKAGE.rglob("*.py")) - {PACKAGE / "door" / "sources.py"}:  # which runs signatures of this package itself
        for name, options in calls(file):
            assert name not in ("eval", "exec", "compile") and not name.endswith(FORBIDDEN), f"{file}: {name}"
            if name in ("torch.load", "load_from_checkpoint"):
                assert options.get("weights_only", "True") == "True", f"{file}: {name}"
            assert options.get("shell", "False") == "False" and options.get("allow_pickle", "False") == "False", f"{file}: {name}"


@pytest.fixture
def trap(tmp_path):
    """A class path with arguments that would make a file, and the file."""
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "sprung")]}}, tmp_path / "sprung"


def test_a_checkpoint_runs_no_code(small_checkpoint, trap, tmp_path):
    backbone, sprung = trap
    saved = torch.load(small_checkpoint, weights_only=True)
    saved["hyper_parameters"]["backbone"] = backbone
    torch.save(saved, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="subprocess.Popen does not correspond to a subclass of Module"):
        load_module(str(tmp_path / "bad.ckpt"))
    with pytest.raises(SystemExit):
        main(["fit", "--data.root", str(tmp_path), "--ckpt_path", str(tmp_path / "bad.ckpt")])
    assert not sprung.exists()


@pytest.mark.parametrize(
    "key", ["model.backbone", "data.dataset", "trainer.callbacks", "trainer.logger", "trainer.strategy", "trainer.plugins"]
)
def test_a_config_takes_only_classes_of_the_right_kind(key, trap, tmp_path, capsys):
    value, sprung = trap
    group, name = key.split(".")
    (tmp_path / "bad.yaml").write_text(f"{group}:\n  {name}: {[value] if name == 'callbacks' else value}\n")
    root = [] if name == "dataset" else ["--data.root", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(tmp_path / "bad.yaml"), *root])
    assert end.value.code == 2 and name in capsys.readouterr().err and not sprung.exists()
