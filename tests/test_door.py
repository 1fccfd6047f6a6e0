"""The light door of the command line: what is answered or refused without torch, in a few lines."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import ArgumentError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import write_images
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dino_lightning.__main__ import main as command
from dino_lightning.cli import DINOCLI, main
from dino_lightning.door import commands, errors, faces
from dino_lightning.door.entrance import enter
from dino_lightning.door.errors import UsageError
from dino_lightning.methods import METHODS
from dino_lightning.tools import TOOLS
from dino_lightning.training.guard import NonFiniteLossError

# Each list of arguments in one process; what the command wrote, and whether anything heavy was imported.
LIGHT = """
import contextlib, io, json, sys
import dino_lightning
assert "DINOModule" in dir(dino_lightning) and not hasattr(dino_lightning, "DINOModul")
from dino_lightning.__main__ import main
answers = []
for args in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps([answers, sorted({"torch", "lightning"} & set(sys.modules))]))
"""


def lightly(*cases):
    """(exit code, stdout, stderr) of each list of arguments."""
    command = [sys.executable, "-c", LIGHT, json.dumps([list(map(str, case)) for case in cases])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers, heavy = json.loads(done.stdout)
    assert heavy == []
    return answers


WRONG = [
    (["knnn"], 2, "unknown command 'knnn'; did you mean 'knn'? Commands: fit, validate, test, predict, adopt,"),
    (["--data.root", "photos"], 2, "give a command before --data.root: fit, "),
    (["fit", "--config", "vit_smal"], 2, "'vit_smal' and no recipe of that name; did you mean 'vit_small'? recipes: auto, cifar10"),
    (["fit", "--data.bach_size", "3"], 2, "unknown option --data.bach_size of fit; did you mean --data.batch_size?"),
    (["validate", "--model.lrr=3"], 2, "unknown option --model.lrr of validate; did you mean --model.lr?"),
    (["fit", "--batch-size=3"], 2, "unknown option --batch-size of fit; did you mean --data.batch_size?"),
    (["fit", "--trainer.callback+=OnlineKNN"], 2, "unknown option --trainer.callback+ of fit; did you mean --trainer.callbacks?"),
    (["fit", "--frobnicate"], 2, "unknown option --frobnicate of fit; dino-lightning fit --help lists them"),
    (["fit", "photos"], 2, "fit takes options only, got 'photos'; did you mean --data.root photos?"),
    (["fit", "quickstart"], 2, "fit takes options only, got 'quickstart'; did you mean --config quickstart?"),
    (["quickstart"], 2, "quickstart is a recipe: dino-lightning fit --config quickstart"),
    (["fit", "--config", "quickstart", "--data.root", "."], 2, "there are two sources of images: data.root ., and data.dataset (the quickstarts generate"),
    (["knn", "--checkpoint", "RUN/last.ckpt", "--root", "."], 2, "; RUN stands for the folder of a run, such as lightning_logs/version_0"),
    (["fit", "--data.root", ".", "--model.lr", "fast"], 2, "--model.lr takes float, got fast"),
    (["fit", "--data.root", ".", "--trainer.max_epochs=1.5"], 2, "--trainer.max_epochs takes int or null, got 1.5"),
    (["fit", "--config", "wrong.yaml"], 2, "unknown key data.bach_size in wrong.yaml; did you mean data.batch_size?"),
    (["fit", "--config", "torn.yaml"], 2, "torn.yaml is no YAML: "),
    (["fit", "--config", "odd.yaml"], 2, "data.root takes a folder, got [3]"),
    (["fit", "--config", "vit_small"], 2, "fit needs images: add --data.root FOLDER (a folder of images), or data.dataset"),
    (["fit", "--data.root", "nowhere"], 2, "there is no image folder nowhere"),
    (["knn", "--bach_size", "3"], 2, "unknown option --bach_size of knn; did you mean --batch_size?"),
    (["knn", "--config", "wrong.yaml"], 2, "unknown key data in wrong.yaml; dino-lightning knn --help lists them"),
    (["knn", "--root", "."], 2, "knn needs --checkpoint; dino-lightning knn --help explains"),
    (["attention", "--checkpoint", "dino_vits16"], 2, "attention needs IMAGES"),
    (["knn", "--checkpoint", "dino_vits16", "--root", ".", "--image_size", "big"], 2, "--image_size takes int or null, got big"),
    (["export", "--checkpoint", "dino_vits16", "--to", "pdf"], 2, "--to takes 'torchhub', 'timm', "),
    (["knn", "--checkpoint", "no.ckpt", "--root", "."], 2, "there is no checkpoint no.ckpt in /"),
    (["knn", "--checkpoint", "dino_vits16", "--root", "nowhere"], 2, "there is no image folder nowhere"),
    (["estimate", "--devcies", "8"], 2, "unknown option --devcies of estimate; did you mean --devices?"),
    (["estimate", "--data.bach_size", "8"], 2, "unknown option --data.bach_size of estimate; did you mean --data.batch_size?"),
    (["estimate", "--devices", "many"], 2, "--devices takes int or null, got many"),
    (["estimate", "--data.batch_size", "many"], 2, "--data.batch_size takes int, got many"),
    (["estimate", "--config", "vit_smal"], 2, "'vit_smal' and no recipe of that name; did you mean 'vit_small'?"),
    (["estimate", "vit_small"], 2, "estimate takes options only, got 'vit_small'"),
    (["estimate", "--data.root", "nowhere"], 2, "there is no image folder nowhere"),
]  # fmt: skip


def test_wrong_arguments_are_named_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("data: {bach_size: 3}")
    Path("odd.yaml").write_text("data: {root: [3]}")
    Path("torn.yaml").write_text("data: {batch_size: 3")
    helps = [
        ["--help"],
        [],
        ["--version"],
        ["knn", "--help"],
        ["extract", "--help"],
        ["estimate", "--help"],
        ["fit", "--help"],
        ["test", "-h", "--method", "simclr"],
    ]
    answers = lightly(*(args for args, _, _ in WRONG), *helps)
    for (args, code, message), (found, out, said) in zip(WRONG, answers):
        assert (found, out) == (code, "") and message in said, (args, said)
        assert said.startswith("dino-lightning: error: ") and said.count("\n") <= 3
    everything, nothing, version, knn, extract, estimate, fit, simclr = [
        out for code, out, said in answers[len(WRONG) :] if (code, said) == (0, "")
    ]
    assert everything == nothing and version == "dino-lightning 0.1.0\n"
    assert "worker processes" in knn and "image files, and folders of them" in extract
    assert "--worker_ms" in estimate and "options of fit" in estimate
    assert fit.count("\n") < 120 and max(map(len, fit.splitlines())) <= 120 and "  out_dim  " in fit and "  max_bank" in fit
    assert "accumulate_grad_batches" in fit and "vit_small_boosted" in fit and "  temperature " in simclr and "  out_dim" not in simclr
    with pytest.raises(UsageError, match="did you mean --data.batch_size"):
        main(["fit", "--data.bach_size", "3"])  # the same door in Python


def test_the_options_of_estimate_are_parted_from_those_of_fit():
    args = ["--mfu=0.5", "-c", "vit_small", "--devices", "8", "--trainer.devices", "2", "--link_gbps", "4e2", "--data.hflip_p", "0.1"]
    call = enter(["estimate", *args])
    given = {name: call.options[name] for name in ("mfu", "devices", "link_gbps", "images")}
    assert given == {"mfu": 0.5, "devices": 8, "link_gbps": 400.0, "images": None}
    assert call.args == ["-c", "vit_small", "--trainer.devices", "2", "--data.hflip_p", "0.1"]


COMPLETE = """
source completion
words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); $(complete -p $1 | sed 's/.*-F \\([^ ]*\\).*/\\1/') $1 "${@: -1}" "${@: -2:1}"
          echo "${COMPREPLY[*]}"; }
words dino-lightning f
words dino-lightning fit --data.ro
words dino-lightning fit --method m
words dino-lightning fit --ckpt_path las
words dino-lightning estimate --config quick
words dino-lightning export --to torch
words dino-lightning knn --checkpoint las
words dino-lightning attention las
"""


@pytest.mark.skipif(shutil.which("bash") is None or find_spec("shtab") is None, reason="needs bash and shtab")
def test_a_shell_completes_commands_options_recipes_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for shell, mark in (
        ("zsh", "#compdef dino-lightning"),
        ("fish", "complete -c dino-lightning"),
        ("bash", "-F _shtab_dino_lightning dino-lightning"),
    ):
        with pytest.raises(SystemExit) as end:
            enter(["--completion", shell])
        assert end.value.code == 0 and mark in (script := capsys.readouterr().out)
    Path("completion").write_text(script)
    Path("last.ckpt").touch()
    done = subprocess.run(["bash", "-c", COMPLETE], capture_output=True, text=True)
    expected = [
        "fit finetune",
        "--data.root",
        "moco_v3 mae",
        "last.ckpt",
        "quickstart",
        "torchhub torchvision torch_export",
        "last.ckpt",
        "last.ckpt",
    ]
    assert done.stdout.splitlines() == expected, done.stderr
    with pytest.raises(UsageError, match="one of bash, zsh, fish, got ksh"):
        enter(["--completion", "ksh"])


def test_version_is_quick():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "dino_lightning", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "dino-lightning 0.1.0\n" and time.monotonic() - start < 4  # 0.3 s where nothing else runs


def test_the_door_knows_the_tools_as_they_are():
    assert list(faces.tools()) == sorted(TOOLS) and list(faces.METHOD_LINES) == list(METHODS)
    for name, tool in TOOLS.items():
        stub = faces.tools()[name]
        assert inspect.signature(stub).parameters == inspect.signature(tool).parameters and stub.__doc__ == tool.__doc__


class Parsers(DINOCLI):
    """The parsers of the commands, and nothing that is parsed."""

    def parse_arguments(self, parser, args):
        raise StopIteration(self._subcommand_parsers)


def test_the_door_refuses_nothing_that_the_parser_takes(tmp_path):
    with pytest.raises(StopIteration) as stop:
        Parsers(["fit"])
    assert list(stop.value.value) == list(faces.COMMANDS)
    for name, parser in stop.value.value.items():
        real = {option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")}
        assert [option for option in real if not faces.options(name).have(option)] == []
        known = {option for option in real if option.count(".") < 2} - {"trainer", "model", "data", "checkpoint"}
        assert set(faces.options(name).names()) - {"model.in_chans", "help_all"} <= known, "nor knows more (model.in_chans is linked)"
    kinds = {"data": 15, "model": 20, "trainer": 20, "checkpoint": 10}
    assert all(len(inspect.signature(stub).parameters) >= kinds[group] for group, stub in faces.stubs().items())
    own = tmp_path / "own.yaml"
    own.write_text("data: {dataset: {class_path: Own}, dataset.init_args.count: 3}\ntrainer.max_epochs: 3\nmodel: more.yaml\n")
    for args in (
        ["--trainer.callbacks+=dino_lightning.callbacks.CollapseDoctor", "--trainer.callbacks.stop=true"],
        ["--model.backbone.init_args.embed_dim", "24", "--model.backbone=dino_lightning.VisionTransformer"],
        ["--data.dataset=dino_lightning.data.Scenes", "--data.dataset.init_args.count", "8"],
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs", "--trainer.logger.name=--odd name"],
        ["--trainer.fast_dev_run=true", "--trainer.devices", "2", "--trainer.devices", "[0, 1]", "--checkpoint.save_last", "link"],
        ["--data.global_crops_size", "[32, 48]", "--data.mean", "[0.5]", "--model.lr=1e-4", "--trainer.gradient_clip_val", "null"],
        ["--seed_everything", "true", "--ckpt_path", "last", "--weights_only", "true"],
        ["-c", "vit_small"],
        ["--config=vit_small"],
    ):
        commands.check("fit", [*args, *(["--data.root", str(tmp_path)] if "--data.dataset" not in args[0] else [])])
    commands.check("fit", ["--config=quickstart", "--data.dataset", "null", "--data.root", str(tmp_path)])
    commands.check("fit", ["--config", "quickstart"])
    commands.check("fit", ["--config", str(own)])
    commands.check("fit", ["--print_config"])
    commands.check("fit", ["-h"])


def test_the_door_judges_values_as_the_parser_does():
    with pytest.raises(StopIteration) as stop:
        Parsers(["fit"])
    parser = stop.value.value["fit"]

    def refused(take, *args):
        try:
            take(*args)
        except (UsageError, ArgumentError):
            return True

    options = ("data.mean", "data.global_crops_size", "model.lr", "model.optimizer", "trainer.limit_train_batches", "checkpoint.save_last")
    for option in options:
        for value in ("null", "true", "1", "1e-4", "[1,2]", "abc", "", "'3'", "link", "lars"):
            args = ["--data.root=.", f"--{option}={value}"]
            assert refused(commands.check, "fit", args) == refused(parser.parse_args, args), args


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--trainer.precision", "fp8"], 2, "--trainer.precision takes 64, 32, 16, 'transformer-engine', .* or null, got fp8"),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpth=x"], 2, "ModelCheckpoint: Option 'dirpth' is not accepted"),
        (["--model.backbone", "vit_smal"], 1, "vit_smal"),
        (["--ckpt_path", "last"], 1, "there is no last.ckpt below"),
        (["--data.batch_size", "5000", "--trainer.accelerator", "cpu"], 1, "4 images are fewer than one batch: batch_size=5000"),
        (["--trainer.accelerator", "moon"], 1, "moon"),  # Lightning's MisconfigurationException, or ValueError
    ],
)
def test_errors_of_the_user_take_few_lines(args, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), 4)
    with pytest.raises(SystemExit) as end:
        command(["fit", "--data.root", "images", "--trainer.logger", "false", *args])
    said = capsys.readouterr().err.partition("dino-lightning: error: ")[2]
    assert end.value.code == code and re.search(message, said) and said.count("\n") <= 3
    assert ("(--debug shows where)" in said) == (code == 1)
    if args[0] == "--ckpt_path":
        with pytest.raises(FileNotFoundError):
            command(["fit", "--debug", "--data.root", "images", *args])


def test_errors_of_ours_keep_their_traceback():
    ours = [RuntimeError("x"), KeyError("x"), AttributeError("x"), ModuleNotFoundError("x", name="dino_lightning.gone")]
    users = [NonFiniteLossError("x"), MisconfigurationException("x"), FileNotFoundError("x"), ModuleNotFoundError("x", name="av")]
    assert [errors.of_the_user(error) for error in ours + users] == [False] * 4 + [True] * 4


WORDS = {
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory. "
    "Please try to raise your shared memory limit.": "--ipc=host or --shm-size=8g, or take fewer --data.num_workers",
    "unable to allocate shared memory(shm) for file </torch_7_1>: Resource temporarily unavailable (11)": "--ipc=host",
    "DataLoader worker (pid 7) is killed by signal: Killed.": "take fewer --data.num_workers, and go on with --ckpt_path last",
    "DataLoader worker (pid(s) 7) exited unexpectedly": "for want of memory",
    "CUDA out of memory. Tried to allocate 20.00 MiB.": "a smaller --data.batch_size",
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_errors_of_torch_are_told_with_their_remedy(words, capsys):
    """What torch says, as it is, and as the cause of what the loader says."""
    outer = RuntimeError("DataLoader worker (pid(s) 8) exited unexpectedly")
    outer.__cause__ = RuntimeError(words)
    for told in (outer, outer.__cause__):
        assert errors.of_the_user(told)
        errors.tell(told)
        assert WORDS[words] in capsys.readouterr().err
    peer = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:31448: Connection reset by peer."
    )
    assert "another rank of this run has ended" in errors.remedy(peer)
    assert not errors.of_the_user(RuntimeError("of ours"))


def test_a_lack_of_memory_is_told_with_what_needs_less():
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**50)
    assert errors.remedy(told.value) == errors.remedy(MemoryError()) != ""


def test_a_finished_extraction_answers_without_torch(small_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"), 4)
    Path("photos/broken.jpg").write_text("no image")
    Path("last.ckpt").write_bytes(Path(small_checkpoint).read_bytes())
    args = ["extract", "photos", "--checkpoint", "last.ckpt", "--output", "out"]
    main(args)
    said = capsys.readouterr().out
    assert said == "features of 4 images, 24 numbers each, in out; 1 could not be read\n"
    files = {path: path.read_bytes() for path in Path("out").iterdir()}
    again = [args, ["extract", tmp_path / "photos", *args[2:], "--batch_size", "2"]]
    assert lightly(*again) == [[0, said, ""]] * 2
    assert files == {path: path.read_bytes() for path in Path("out").iterdir()}

    assert enter(args) is None
    for other in (["--image_size", "40"], ["--mean", "[0.5,0.5,0.5]"], ["--what", "patches"], ["--output", "new"], ["--parquet", "true"]):
        assert enter([*args, *other]) is not None
    Path("copy.ckpt").write_bytes(Path("last.ckpt").read_bytes())
    assert enter([*args[:3], "copy.ckpt", *args[4:]]) is not None, "another file: the weights' hash decides"
    write_images(Path("photos"), 1, first=4)
    assert enter(args) is not None, "another image"
    Path("photos/0004.jpg").unlink()
    assert enter(args) is None
    os.utime("last.ckpt", ns=(0, 0))
    assert enter(args) is not None, "the file was touched"
    with open("out/features.npy", "r+b") as file:
        file.truncate(200)
    os.utime("last.ckpt")
    assert enter(args) is not None
