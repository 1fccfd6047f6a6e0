"""What README and documentation show works, and is all that there is."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_images, write_labelled
from torch import nn

from dino_lightning import recipes
from dino_lightning.__main__ import main
from dino_lightning.backbones import build
from dino_lightning.door import commands, faces, tool
from dino_lightning.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"


def commands_in(text):
    """The dino-lightning commands of its bash blocks, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("    #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dino-lightning ")]


def test_the_readme_is_short_and_leads_somewhere():
    text = README.read_text()
    assert text.count("\n") <= 180
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def hooks():
    return runpy.run_path(str(DOCS / "hooks.py"))


def test_pages_take_everything_from_the_code(hooks):
    pages = {page.relative_to(DOCS).as_posix(): hooks["expand"](page.read_text()) for page in PAGES}
    assert "{{" not in "".join(pages.values()) and "As a file this page lacks" not in "".join(pages.values())
    diagrams = re.findall(r"```mermaid\n(.*?)```", pages["explanation/architecture.md"], re.DOTALL)
    assert len(diagrams) == 2 and ";" not in "".join(diagrams), "a semicolon ends a statement of mermaid"
    assert all(f"## {name}\n" in pages["reference/commands.md"] for name in faces.tools())
    assert all(f"## {name}\n" in pages["reference/recipes.md"] for name in recipes.names())
    assert all(f"## {name}: " in pages["reference/methods.md"] for name in METHODS)
    with pytest.raises(LookupError, match="losses/dino.py has 0 times DINOLoss.backward"):
        hooks["expand"]("{{ source losses/dino.py DINOLoss.backward }}")
    assert all(summary.endswith((".", ".)")) for summary in recipes.summaries().values()), "a whole sentence in --help"
    named = README.read_text() + pages["how-to/images.md"]
    assert all(f"`{name}`" in named for name in recipes.names()), "each recipe is for somebody"


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_commands_have_these_options(page, hooks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "small", "features", "cifar10", "clothing"):
        (tmp_path / name).mkdir()
    for name, *args in commands_in(hooks["expand"](page.read_text())):
        for file in (Path(word) for word in args if word.endswith((".ckpt", ".pth", "config.yaml"))):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        if name in faces.tools():
            tool.parse(name, args)
        elif name.startswith("-"):
            assert name in ("--help", "--version")
        else:
            commands.check(name.split("|")[0], args)


@pytest.mark.slow
def test_commands_of_the_readme_run(small_checkpoint, tmp_path, monkeypatch):
    """Each with options that make it short, and other weights in place of those that must be fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_labelled(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photos")
    write_images(tmp_path, 1)
    (tmp_path / "0000.jpg").rename(tmp_path / "photo.jpg")
    torch.save(build("vit_small", patch_size=16).state_dict(), tmp_path / "published.pth")
    short = ["--trainer.max_steps=1", "--data.batch_size=2", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    short += ["--trainer.precision=32-true", "--trainer.limit_val_batches=0", "--model.warmup_epochs=0", "--trainer.num_sanity_val_steps=0"]
    found = commands_in(README.read_text())
    assert {args[0] for args in found} >= {"fit", "evaluate", "export", "estimate", "attention"}
    for args in found:
        args = [word.replace("RUN/checkpoints/last.ckpt", small_checkpoint) for word in args]
        args = ["published.pth" if word == "dino_vits8" else word for word in args]
        if "auto" in args:
            args = ["0.02" if word == "60" else word for word in args]
        elif args[0] == "fit":
            args += [word for word in short if word.partition("=")[0] not in ("--data.num_workers",) or "quickstart" not in args]
            if "warm_start" in args:
                args += ["--model.weights=published.pth", "--model.out_dim=64"]
            if "last" in args:
                args += ["--trainer.max_steps=2"]
        main(args)
    assert (tmp_path / "evaluation" / "index.html").exists() and (tmp_path / "attention").is_dir()


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "python" / "index.html").stat().st_size > 100_000


def test_a_segmentation_head_learns_on_the_frozen_backbone(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(DOCS / "segmentation.py"))
    assert 0 <= example["main"](small_checkpoint, epochs=1) <= 1
    assert not list(tmp_path.iterdir())


def test_its_segments_are_where_the_patches_say_so():
    """A backbone whose only channel is the brightness of a patch: the object can be told by it."""
    example = runpy.run_path(str(DOCS / "segmentation.py"))

    class Brightness(nn.Module):
        embed_dim = 1

        def forward_features(self, images, blocks):
            patches = nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8)
            return [type("Tokens", (), {"patches": patches}) for _ in blocks]

    segmenter = example["Segmenter"](Brightness())
    nn.init.ones_(segmenter.head.weight)
    nn.init.zeros_(segmenter.head.bias)
    images = torch.full((1, 3, 32, 32), -1.0)
    images[..., :16, :16] = 1.0
    found = segmenter(images)[0, 0] > 0
    assert found[:14, :14].all() and not found[18:].any() and not found[:, 18:].any()
