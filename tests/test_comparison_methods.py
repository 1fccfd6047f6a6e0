"""SimCLR, BYOL, MoCo v3 and MAE: losses beside lightly's and by hand, the parts of MAE, and runs of each method."""

import importlib
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F

from dino_lightning import BYOLModule, MAEModule, MoCoV3Module, MultiCropDataModule, SimCLRModule, VisionTransformer
from dino_lightning.backbones.pixel_decoder import PixelDecoder
from dino_lightning.backbones.positions import sincos_positions
from dino_lightning.backbones.projector import projector
from dino_lightning.callbacks import CollapseDoctor, OnlineProbe
from dino_lightning.losses import BYOLLoss, InfoNCELoss, MaskedPixelsLoss, NTXentLoss
from dino_lightning.losses.masked_pixels import patches_of

METHODS = [SimCLRModule, BYOLModule, MoCoV3Module, MAEModule]


def pair(n=6, dim=5, **options):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(n, dim, generator=random, dtype=torch.float64, **options) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_lightlys_and_the_formula(temperature):
    lightly = importlib.import_module("lightly.loss")
    first, second = pair(requires_grad=True)
    loss = NTXentLoss(temperature)(first, second)
    torch.testing.assert_close(loss, lightly.NTXentLoss(temperature)(first, second), rtol=1e-9, atol=1e-9)
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarities = (z @ z.T / temperature).exp()
    terms = [-(similarities[i, (i + 6) % 12] / (similarities[i].sum() - similarities[i, i])).log() for i in range(12)]
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert torch.autograd.gradcheck(NTXentLoss(temperature), (first, second))


def test_limits_of_nt_xent():
    same = torch.ones(4, 3)
    assert NTXentLoss()(same, same).item() == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-6), "nothing to tell by"
    apart = torch.eye(4)
    assert NTXentLoss(0.01)(apart, 5 * apart).item() < 1e-6, "lengths do not count"


RANK = """
import sys
import torch
import torch.distributed as dist
from dino_lightning.losses import InfoNCELoss, NTXentLoss
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
found = []
for loss in (NTXentLoss(0.3), InfoNCELoss(0.3)):
    first, second = (view.chunk(2)[rank].clone().requires_grad_() for view in torch.load(f"{folder}/pair.pt"))
    value = loss(first, second)
    value.backward()
    found.append((value.detach(), first.grad, second.grad if second.grad is not None else torch.zeros_like(second)))
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()  # a process that only ends may abort: its threads still run
"""


def test_two_ranks_have_each_others_negatives(tmp_path):
    torch.save(pair(), tmp_path / "pair.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    found = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))
    for loss, (zero, one) in zip((NTXentLoss(0.3), InfoNCELoss(0.3)), found):
        first, second = pair(requires_grad=True)
        value = loss(first, second)
        value.backward()
        torch.testing.assert_close((zero[0] + one[0]) / 2, value.detach())
        for view, index in ((first, 1), (second, 2)):
            expected = view.grad if view.grad is not None else torch.zeros_like(view)
            torch.testing.assert_close(torch.cat([zero[index], one[index]]) / 2, expected)  # what the ranks' average would be


def test_byol_is_lightlys_and_the_formula():
    lightly = importlib.import_module("lightly.loss")
    first, second = pair(requires_grad=True)
    loss = BYOLLoss()(first, second)
    torch.testing.assert_close(loss, 2 + 2 * lightly.NegativeCosineSimilarity()(first, second), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1).mean())
    loss.backward()
    assert first.grad.abs().sum() > 0 and second.grad is None, "targets get no gradient"
    assert BYOLLoss()(first, 3 * first).item() == pytest.approx(0) and BYOLLoss()(first, -first).item() == pytest.approx(4)


def test_info_nce_is_the_formula():
    queries, keys = pair(requires_grad=True)
    loss = InfoNCELoss(0.2)(queries, keys)
    q, k = F.normalize(queries, dim=1), F.normalize(keys, dim=1).detach()
    chances = (q @ k.T / 0.2).softmax(dim=1).diagonal()
    torch.testing.assert_close(loss, -0.4 * chances.log().mean())
    loss.backward()
    assert queries.grad.abs().sum() > 0 and keys.grad is None


def test_masked_pixels_are_those_of_lightly_and_normalised():
    images = torch.rand(3, 3, 8, 12, dtype=torch.float64)
    patches = patches_of(images, 4)
    torch.testing.assert_close(patches[:, 4].unflatten(-1, (4, 4, 3)).permute(0, 3, 1, 2), images[:, :, 4:, 4:8])
    square = torch.rand(2, 3, 8, 8)
    lightly = importlib.import_module("lightly.models.utils")
    torch.testing.assert_close(patches_of(square, 4), lightly.patchify(square, 4))
    masks = torch.tensor([[1, 1, 0, 1, 0, 1]] * 3).bool()
    noise = torch.randn_like(patches)
    targets = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = F.mse_loss((targets + noise)[masks], targets[masks])
    predictions = (targets + noise).masked_fill(~masks[..., None], 1e6)  # what was seen does not count
    torch.testing.assert_close(MaskedPixelsLoss()(predictions, images, masks), expected)
    torch.testing.assert_close(MaskedPixelsLoss(False)(patches + noise, images, masks), noise[masks].square().mean())
    with pytest.raises(ValueError, match="do not fit"):
        MaskedPixelsLoss()(predictions, images, masks[:, :5])
    for shape, size in (((2, 1, 12), (4, 4)), ((2, 4, 12), (8, 8)), ((2, 4, 12), (5, 5))):  # fewer patches than the image has; none fit
        with pytest.raises(ValueError, match="do not fit"):
            MaskedPixelsLoss()(torch.rand(shape), torch.rand(2, 3, *size), torch.ones(shape[:2], dtype=torch.bool))


def test_the_encoder_of_mae_sees_what_is_kept():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, registers=2)
    images = torch.randn(2, 3, 32, 32)
    order = torch.rand(2, 16).argsort(1)
    everything = vit.forward_kept(images, order)
    tokens = vit.forward_features(images)[0]
    torch.testing.assert_close(everything[:, 0], tokens.cls, rtol=1e-4, atol=1e-5)
    patches = tokens.patches.flatten(2).transpose(1, 2).gather(1, order[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(everything[:, 3:], patches, rtol=1e-4, atol=1e-5)
    kept = order[:, :4]
    before, seen = vit.forward_kept(images, kept), torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    hidden = ~seen.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(before, vit.forward_kept(images.masked_fill(hidden, 7.0), kept)), "hidden pixels play no part"


def test_the_decoder_of_mae_puts_patches_in_their_places():
    torch.manual_seed(0)
    decoder = PixelDecoder(6, 12, (2, 3), dim=8, depth=1, num_heads=2)
    tokens, kept = torch.randn(2, 4, 6), torch.tensor([[5, 0, 2], [1, 4, 3]])
    pixels = decoder(tokens, kept)
    assert pixels.shape == (2, 6, 12)
    turned = torch.tensor([2, 0, 1])
    again = decoder(torch.cat([tokens[:, :1], tokens[:, 1:][:, turned]], dim=1), kept[:, turned])
    torch.testing.assert_close(pixels, again)
    assert not torch.allclose(pixels, decoder(tokens, kept.flip(1)))


def test_fixed_positions():
    positions = sincos_positions((2, 3), 16)
    assert positions.shape == (1, 7, 16) and not positions[0, 0].any()
    patch = positions[0, 1 + 1 * 3 + 2]  # row 1, column 2
    frequencies = 10000.0 ** -(torch.arange(4) / 4)
    expected = torch.cat([(2 * frequencies).sin(), (2 * frequencies).cos(), frequencies.sin(), frequencies.cos()])
    torch.testing.assert_close(patch, expected)
    with pytest.raises(ValueError, match="18"):
        sincos_positions((2, 2), 18)


def test_projectors():
    three = projector(4, 8, 2, layers=3, last_norm="plain")
    assert [type(part) for part in three] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d]
    assert three[-1].weight is None and three[-2].bias is None and projector(4, 8, 2)[-1].bias is not None
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got 0"):
        projector(4, 0, 2)


def build(method, **options):
    seed_everything(0, verbose=False)
    shape = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2} if method is MAEModule else {"hidden_dim": 16, "projection_dim": 8}
    if method in (BYOLModule, MoCoV3Module):
        shape["momentum_teacher"] = 0.9999  # targets that stand still can be learnt
    backbone = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.1)
    return method(backbone, img_size=16, optimizer="adamw", lr=0.1, warmup_epochs=0, **shape, **options)


def data(method, **options):
    rng = torch.Generator().manual_seed(1)
    colours = torch.randint(0, 256, (16, 3, 2, 2), dtype=torch.uint8, generator=rng)
    images = [(colour.repeat_interleave(10, 1).repeat_interleave(10, 2), i % 2) for i, colour in enumerate(colours)]
    plain = {"jitter_p": 0.0, "grayscale_p": 0.0, "solarize_p": 0.0}
    return MultiCropDataModule(dataset=images, batch_size=8, num_workers=0, global_crops_size=16, **{**method.data, **plain, **options})


def trainer(*callbacks, **options):
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                   callbacks=[CollapseDoctor(), OnlineProbe(num_classes=2), *callbacks], **options)  # fmt: skip


class Losses(Callback, list):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.append(outputs["loss"].item())


class Stop(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 9:  # within the fifth epoch
            trainer.save_checkpoint(self.folder / "half.ckpt")
            trainer.should_stop = True


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_saves_and_goes_on_exactly(method, tmp_path):
    whole, run = build(method), trainer(max_epochs=12, enable_checkpointing=False)
    run.callbacks.append(losses := Losses())
    run.fit(whole, data(method))
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8]), losses
    assert {"train/loss", "train/lr", "train/feature_std", "train/view_agreement"} <= run.callback_metrics.keys()
    assert ("train/momentum" in run.callback_metrics) == (method in (BYOLModule, MoCoV3Module))

    half, first = build(method), trainer(Stop(tmp_path), max_epochs=12, enable_checkpointing=False)
    first.fit(half, data(method))
    rest = build(method)
    trainer(max_epochs=12, enable_checkpointing=False).fit(rest, data(method), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    assert method.load_from_checkpoint(tmp_path / "half.ckpt", backbone=half.evaluated.backbone)(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
    assert rest.as_backbone()(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


@pytest.mark.parametrize("method", METHODS)
def test_local_views_are_left_out_and_said(method, caplog):
    module = build(method)
    trainer(fast_dev_run=True).fit(module, data(method, local_crops_number=3, local_crops_size=8))
    assert "has no use for the 3 local views" in caplog.text


def test_teachers_follow_without_a_predictor():
    module = build(BYOLModule)
    before = {name: value.clone() for name, value in module.teacher.named_parameters()}
    assert not any(name.startswith("predictor") for name in before)
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.add_(1)
    module.teacher.follow(module.student, 0.9)
    for name, value in module.teacher.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.1)


def test_refused():
    for loss in (NTXentLoss(), InfoNCELoss(), BYOLLoss()):
        with pytest.raises(ValueError, match=r"\(B, D\)"):
            loss(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        SimCLRModule("vit_tiny", temperature=0.0)
    with pytest.raises(ValueError, match="MAE hides patches, which ResNet has not"):
        MAEModule("resnet18")
    with pytest.raises(ValueError, match="masking_ratio=1.0 hides 16 of 16"):
        build(MAEModule, masking_ratio=1.0)
    with pytest.raises(ValueError, match="decoder_heads=3 does not divide"):
        MAEModule("vit_tiny", decoder_heads=3)


def test_mae_positions_are_fixed_and_moco_keeps_its_patch_embedding():
    mae, moco = build(MAEModule), build(MoCoV3Module)
    assert torch.equal(mae.network.backbone.pos_embed, sincos_positions((4, 4), 16))
    fixed = {name for name, value in mae.network.named_parameters() if not value.requires_grad}
    assert fixed == {"backbone.pos_embed"}
    assert {name for name, value in moco.student.named_parameters() if not value.requires_grad} == {
        "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}  # fmt: skip
    group = mae.build_optimizer(fused=False).param_groups[0]
    assert group["betas"] == (0.9, 0.95)
