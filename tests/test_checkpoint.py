"""What a tool says to a file that is not the checkpoint it needs."""

import zipfile

import pytest
import torch
from conftest import write_images
from lightning.pytorch import Trainer

from dino_lightning import DINOModule
from dino_lightning.cli import main
from dino_lightning.tools.checkpoint import load_module


@pytest.fixture
def checkpoint(tmp_path):
    module = DINOModule("shufflenet_v2_x0_5", img_size=32, out_dim=8, hidden_dim=8, warmup_epochs=0)
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                      enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([[torch.rand(3, 32, 32)] * 2] * 2, batch_size=2))
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    return tmp_path / "good.ckpt"


def test_a_whole_checkpoint_loads_and_others_are_refused_by_name(checkpoint):
    teacher = load_module(str(checkpoint)).teacher.state_dict()
    saved = torch.load(checkpoint)
    assert all(torch.equal(value, saved["state_dict"][f"teacher.{name}"]) for name, value in teacher.items())
    bad = checkpoint.with_name("bad.ckpt")

    def refuses(error, message):
        with pytest.raises(error, match=message):
            load_module(str(bad))

    refuses(FileNotFoundError, "there is no checkpoint .*bad.ckpt")
    bad.write_text("no checkpoint at all")
    refuses(ValueError, "bad.ckpt is no checkpoint, or not a whole one")
    bad.write_bytes(checkpoint.read_bytes()[:5000])
    refuses(ValueError, "bad.ckpt is no checkpoint, or not a whole one")
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("bad/data.pkl", b"\x80\x02h\x31.")  # what was never put into the pickle's memo
        archive.writestr("bad/byteorder", b"little")
        archive.writestr("bad/version", b"3\n")
    refuses(ValueError, r"bad.ckpt is no checkpoint, .*: its pickle is damaged \(KeyError: 49\); expected")
    photo = write_images(checkpoint.parent, 1) / "0000.jpg"
    bad.write_bytes(photo.read_bytes())
    refuses(ValueError, "^.*bad.ckpt is no checkpoint.*: it begins like a JPEG image; expected a checkpoint of dino-lightning fit$")
    with pytest.raises(ValueError, match="it begins like a JPEG image; expected a checkpoint or weights") as refusal:
        main(["knn", "--checkpoint", str(photo), "--root", str(checkpoint.parent)])
    assert refusal.value.__suppress_context__, "torch's advice, to load it unsafely, is not shown either"
    torch.save({"model": torch.nn.Linear(2, 2)}, bad)
    refuses(ValueError, "^.*bad.ckpt is no checkpoint.*: it holds torch.nn.modules.linear.Linear, which may be code; expected [^\\n]*$")
    torch.save({"model": {}, "epoch": 3}, bad)
    refuses(ValueError, "bad.ckpt holds no DINOModule, but model, epoch; expected a checkpoint of dino-lightning fit")
    torch.save({**saved, "state_dict": {f"other.{name}": value for name, value in saved["state_dict"].items()}}, bad)
    refuses(ValueError, "holds no DINOModule")
    torch.save({**saved, "hyper_parameters": {**saved["hyper_parameters"], "in_chans": 1}}, bad)
    refuses(ValueError, "are of another network than its options describe: (?s:.*)conv1.0.weight")
    del saved["state_dict"]["teacher.backbone.conv1.0.weight"]
    torch.save(saved, bad)
    refuses(ValueError, "Missing key(?s:.*)teacher.backbone.conv1.0.weight")
