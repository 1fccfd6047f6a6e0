"""Parts of DINOv2 outside its losses against golden numbers: its ViT, drop path, masks, parameter groups, clipping."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from dino_lightning import VisionTransformer
from dino_lightning.backbones import block as blocks
from dino_lightning.backbones import build, freeze_unused
from dino_lightning.backbones.block import FFNS, Block, drop_path_subset
from dino_lightning.data import masking
from dino_lightning.data.masking import sample_masks
from dino_lightning.training.optim import Layered, clip_together_, gradient_norms, layered, layered_param_groups
from dino_lightning.training.randomness import seeded


def small_vit(**options) -> VisionTransformer:
    return VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **options})


@pytest.mark.parametrize("variant", ["plain", "registers_swiglu", "antialias"])
@pytest.mark.parametrize("size", ["32x32", "16x16", "32x48"])
def test_vit_equals_the_reference(golden, variant, size):
    g = golden("dinov2/vit")
    ours = {
        "registers": "num_register_tokens", "layer_scale": "init_values", "ffn": "ffn_layer", "position_offset": "interpolate_offset",
        "position_antialias": "interpolate_antialias",
    }  # fmt: skip
    names = {name: name for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")} | ours
    arguments = {name: g._arrays[f"{variant}.args.{theirs}"].item() for name, theirs in names.items()}
    vit = VisionTransformer(**arguments, mask_token=True).eval()
    vit.load_state_dict(g.part(f"{variant}.state."))
    with torch.no_grad():
        plain = vit.forward_features(g[f"{size}.input"])[0]
        masked = vit.forward_features(g[f"{size}.input"], masks=g[f"{size}.masks"])[0]
    for tokens, key in ((plain, f"{variant}.{size}"), (masked, f"{variant}.{size}.masked")):
        assert tokens.registers.shape[1] == arguments["registers"]
        torch.testing.assert_close(tokens.cls, g[f"{key}.cls"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokens.patches.flatten(2).transpose(1, 2), g[f"{key}.patch"], rtol=1e-4, atol=1e-4)
        if arguments["registers"]:
            torch.testing.assert_close(tokens.registers, g[f"{key}.reg"], rtol=1e-4, atol=1e-4)
    assert (plain.cls - masked.cls)[0].abs().max() > 1e-3 and torch.equal(plain.cls[1], masked.cls[1]), "the first image alone is masked"


def test_tokens_begin_as_those_of_dinov2():
    torch.manual_seed(0)
    vit = small_vit(mask_token=True, registers=4, embed_dim=384)
    assert vit.mask_token.shape == (1, 384) and not vit.mask_token.any()
    assert vit.cls_token.std().item() == pytest.approx(1e-6, rel=0.1)
    assert vit.register_tokens.std().item() == pytest.approx(1e-6, rel=0.1)
    plain = small_vit(embed_dim=384)
    assert plain.mask_token is None and plain.cls_token.std().item() == pytest.approx(0.02, rel=0.1)


def test_masks_under_autocast_leave_precision_and_gradients():
    vit = small_vit(mask_token=True)
    nn.init.normal_(vit.mask_token)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, :5] = True
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        (tokens,) = vit.forward_features(x, masks=masks)
        assert vit._tokens(x, masks).dtype == vit._tokens(x).dtype
    tokens.patches.float().square().sum().backward()
    assert vit.mask_token.grad.dtype == torch.float32 and vit.mask_token.grad.any()
    vit.patch_embed.zero_grad()
    everywhere = torch.ones(2, 16, dtype=torch.bool)
    vit.forward_features(x, masks=everywhere)[0].cls.sum().backward()
    assert not vit.patch_embed.proj.weight.grad.any(), "nothing of a masked patch is seen"


def test_masks_that_do_not_fit_are_refused():
    x, masks = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="has no mask token; build it with mask_token=True"):
        small_vit().forward_features(x, masks=masks)
    for wrong in (masks[:1], masks[:, :9], masks.view(2, 4, 4), masks.float()):
        with pytest.raises(ValueError, match=r"masks must be bool of shape \(images, patches\), here \(2, 16\), got torch\."):
            small_vit(mask_token=True).forward_features(x, masks=wrong)


def test_a_mask_token_is_frozen_where_nothing_is_masked(caplog):
    vit = small_vit(mask_token=True)
    freeze_unused(vit, torch.randn(1, 3, 32, 32))
    assert [name for name, p in vit.named_parameters() if not p.requires_grad] == ["mask_token"] and "mask_token" in caplog.text


def test_build_shapes_vits_by_name_and_refuses_what_others_lack():
    with torch.device("meta"):
        shaped = build("vit_tiny", registers=2, layer_scale=1e-5, ffn="swiglu", mask_token=True, drop_path_uniform=True, drop_path_rate=0.3)
        published = build("dinov2_vits14_reg", mask_token=True, drop_path_uniform=True, drop_path_rate=0.2)
        plain = build("dinov2_vits14", layer_scale=1e-5)
    assert shaped.prefix_tokens == 3 and shaped.layer_scale == 1e-5 and hasattr(shaped.blocks[0].mlp, "w12")
    assert shaped.mask_token is not None and [b.drop_path for b in shaped.blocks] == [0.3] * 12
    assert published.prefix_tokens == 5 and published.mask_token is not None and published.blocks[0].drop_path == 0.2
    assert plain.mask_token is None and plain.prefix_tokens == 1
    with pytest.raises(ValueError, match="dinov2_vits14 has 0 registers, not 2; choose dinov2_vits14_reg for 4"):
        build("dinov2_vits14", registers=2)
    for name in ("resnet18", "timm/resnet18"):
        with pytest.raises(ValueError, match=f"{name} takes no mask_token=True: only a VisionTransformer has this; choose one of vit_tiny"):
            build(name, mask_token=True)
        with pytest.raises(ValueError, match="takes no registers=4"):
            build(name, registers=4)


def test_drop_path_keeps_as_many_as_the_reference(golden):
    for batch, rate, kept, factor in golden("dinov2/drop_path")["table"].tolist():
        found = drop_path_subset(int(batch), rate)
        assert found == (kept, pytest.approx(factor, rel=1e-12)), (batch, rate)


@pytest.mark.parametrize("i", [0, 1])
def test_drop_path_equals_the_reference(golden, i, monkeypatch):
    g = golden("dinov2/drop_path")
    block = Block(24, 3, FFNS["mlp"](24, 96), g.item("block.args.drop_path"), 1e-5, 1e-6, drop_path_by_subset=True)
    block.load_state_dict(g.part("block.state."))
    x = g[f"block.input{i}"]
    drawn = [g[f"block.kept{i}.{branch}"] for branch in ("attention", "mlp")]
    asked = []

    def given(batch, count, device):
        asked.append((batch, count))
        return drawn[len(asked) - 1]

    monkeypatch.setattr(blocks, "drawn_samples", given)
    torch.testing.assert_close(block.train()(x), g[f"block.output{i}"], rtol=1e-4, atol=1e-5)
    assert asked == [(len(x), len(kept)) for kept in drawn]
    assert not torch.equal(block.eval()(x), g[f"block.output{i}"]) and len(asked) == 2, "nothing is dropped in evaluation"


def test_uniform_drop_path_drops_in_every_block_by_torchs_generator():
    vit = small_vit(drop_path_rate=0.4, drop_path_uniform=True, layer_scale=1.0)
    x = torch.randn(10, 5, 24)
    branches = []
    block = vit.blocks[0].train()
    assert [b.drop_path for b in vit.blocks] == [0.4, 0.4]
    block.attn.register_forward_hook(lambda module, inputs, output: branches.append(len(output)))
    block.ls2.gamma.data.zero_()
    with seeded(torch.device("cpu"), 0):
        first = block(x)
    with seeded(torch.device("cpu"), 0):
        again = block(x)
    assert torch.equal(first, again) and not torch.equal(first, block(x)), "a function of the seed"
    assert set(branches) == {6}, "the branch is computed for the kept samples only"
    unchanged = (first == x).flatten(1).all(dim=1)
    expected = (x + 10 / 6 * block.ls1(block.attn(block.norm1(x))))[~unchanged]
    assert unchanged.sum() == 4
    torch.testing.assert_close(first[~unchanged], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.float32, "the stream of tokens keeps its precision"
        small_vit(drop_path_rate=0.4, drop_path_uniform=True)(torch.randn(3, 3, 32, 32)).sum().backward()


def test_drop_path_of_each_sample_by_itself_does_not_compute_what_it_drops():
    """DINO's law: independent draws, and the factor 1 / (1 - rate)."""
    block = small_vit(drop_path_rate=0.4).blocks[1].train()
    x = torch.randn(4000, 2, 24)

    def mlp_branch(x):
        return block.mlp(block.norm2(x))

    with seeded(torch.device("cpu"), 0), torch.no_grad():
        change = block._with_branch(x, mlp_branch) - x
        expected = mlp_branch(x) / 0.6
    kept = change.flatten(1).any(dim=1)
    assert abs(kept.sum().item() - 2400) < 5 * math.sqrt(4000 * 0.4 * 0.6)
    torch.testing.assert_close(change[kept], expected[kept], rtol=1e-4, atol=1e-5)
    pairs = kept.view(-1, 2).sum(dim=1).bincount(minlength=3) / 2000
    torch.testing.assert_close(pairs, torch.tensor([0.16, 0.48, 0.36]), rtol=0, atol=0.06)
    block.drop_path = 0.999  # nobody is kept
    for precision in (torch.float32, torch.bfloat16):
        with seeded(torch.device("cpu"), 0), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            assert torch.equal(block(x[:2]), x[:2])
            block(x[:2].requires_grad_()).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters()), "gradients are there for all ranks to meet"


class Recorded(np.random.Generator):
    """It remembers what each crop of a batch asked for, and the order in which crops were masked."""

    def uniform(self, *arguments):
        self.shares = super().uniform(*arguments)
        return self.shares

    def permutation(self, count):
        self.order = super().permutation(count)
        return self.order


def components(masks):
    """The number of 4-connected blocks in each of the masks (n, h, w): the cells that keep their label as its blocks take their greatest."""
    own = np.arange(1, masks[0].size + 1).reshape(masks.shape[1:])
    labels = np.where(masks, own, 0)
    while True:
        padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        around = [padded[:, 1:-1, 1:-1], padded[:, 2:, 1:-1], padded[:, :-2, 1:-1], padded[:, 1:-1, 2:], padded[:, 1:-1, :-2]]
        grown = np.where(masks, np.max(around, axis=0), 0)
        if np.array_equal(grown, labels):
            return ((labels == own) & masks).sum(axis=(1, 2))
        labels = grown


def z_of_means(mean, n, golden_mean, golden_sd, golden_n):
    return ((mean - golden_mean.numpy()) / (golden_sd.numpy() * math.sqrt(1 / n + 1 / golden_n))).ravel()


def z_of_histogram(values, golden_histogram):
    """Of the share of each value; those that are rare count together, since few have no normal distribution."""
    golden_histogram = golden_histogram.numpy()
    histogram = np.bincount(values, minlength=len(golden_histogram))
    assert len(histogram) == len(golden_histogram), "a value that the reference cannot have"
    n, golden_n = len(values), golden_histogram.sum()
    rare = (golden_histogram + histogram) * n / (n + golden_n) < 20
    share, golden_share = (np.append(h[~rare], h[rare].sum()) / h.sum() for h in (histogram, golden_histogram))
    p = (share * n + golden_share * golden_n) / (n + golden_n)
    differ = (p > 0) & (p < 1)
    return ((share - golden_share)[differ]) / np.sqrt((p * (1 - p))[differ] * (1 / n + 1 / golden_n))


def assert_same_law(scores):
    """Fails for the golden law with a probability below 1e-6, whatever statistic it is that differs."""
    bound = NormalDist().inv_cdf(1 - 1e-6 / 2 / sum(map(len, scores.values())))
    worst = {name: round(float(np.abs(z).max()), 1) for name, z in scores.items()}
    assert max(worst.values()) < bound, (worst, bound)


@pytest.mark.parametrize("setting, n_batches", [(0, 600), (1, 1600)])
def test_masks_have_the_law_of_the_reference(golden, setting, n_batches):
    g = golden("dinov2/masks")
    side, n_images = g.item(f"{setting}.config.grid"), g.item(f"{setting}.config.batch_size")
    n_masked = g.item(f"{setting}.config.images_masked_per_batch")
    golden_n = g.item(f"{setting}.config.n_images")
    generator = Recorded(np.random.PCG64(0))
    masks, requests, both = [], [], []
    for _ in range(n_batches):
        batch = sample_masks(2 * n_images, side, ratio=tuple(g[f"{setting}.config.ratio"].tolist()), generator=generator)
        assert batch.shape == (2 * n_images, side, side) and batch.dtype == torch.bool
        is_masked = batch.flatten(1).any(dim=1)
        assert is_masked.sum() == n_masked
        both.append((is_masked[:n_images] & is_masked[n_images:]).sum().item())
        masks.append(batch[torch.from_numpy(generator.order[:n_masked])].numpy())
        requests.append((generator.shares * side**2).astype(int))
    masks, requests = np.stack(masks), np.concatenate(requests)
    counts = masks.sum(axis=(2, 3))
    flat = masks.reshape(-1, side, side)
    n = len(flat)

    def means(name, found, samples=n, golden_samples=golden_n):
        return z_of_means(found, samples, g[f"{setting}.{name}.mean"], g[f"{setting}.{name}.sd"], golden_samples)

    occupancy = g[f"{setting}.occupancy"]
    rim = torch.ones(side, side, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    borders = flat[:, rim.numpy()].mean(axis=1)
    labels = components(flat[:4000])
    assert_same_law({
        "count": means("count", counts.mean()),
        "counts": z_of_histogram(counts.ravel(), g[f"{setting}.count.hist"]),
        "requests": z_of_histogram(requests, g[f"{setting}.requested.hist"]),
        "shortfall": z_of_histogram(requests - counts.ravel(), g[f"{setting}.shortfall.hist"]),
        "strata": means("stratum", counts.mean(axis=0), n_batches, g.item(f"{setting}.stratum.n")),
        "occupancy": z_of_means(flat.mean(axis=0), n, occupancy, (occupancy * (1 - occupancy)).sqrt(), golden_n),
        "border": z_of_means(borders.mean(), n, occupancy[rim].mean(), torch.tensor(borders.std()), golden_n),
        "rows": means("rows", flat.mean(axis=(0, 2))),
        "columns": means("cols", flat.mean(axis=(0, 1))),
        "blocks": means("blocks", labels.mean(), len(labels)),
        "numbers of blocks": z_of_histogram(labels, g[f"{setting}.blocks.hist"]),
        "both views": means("both_views", np.mean(both), n_batches, golden_n // n_masked),
    })  # fmt: skip


@pytest.mark.parametrize("target", range(4))
def test_a_mask_for_a_request_has_the_law_of_the_reference(golden, target):
    g = golden("dinov2/masks")
    side, request = g.item(f"target{target}.grid"), g.item(f"target{target}.requested")
    draws = masking._draws(np.random.default_rng(target))
    counts = [masking._mask(request, side, side, draws).bit_count() for _ in range(5000)]
    assert_same_law({"counts": z_of_histogram(np.array(counts), g[f"target{target}.count.hist"])})


@pytest.mark.parametrize("grid, cap", [(14, 98), (16, 128), (8, 32), (7, 21), ((4, 10), 20)])
def test_no_block_of_a_mask_is_larger_than_half_of_it(grid, cap, monkeypatch):
    """As the golden caps are; their requests stay below them."""
    rooms = []
    new_block = masking._new_block
    monkeypatch.setattr(masking, "_new_block", lambda mask, room, *rest: (rooms.append(room), new_block(mask, room, *rest))[1])
    sample_masks(20, grid, ratio=(0.9, 0.9), probability=1.0, generator=np.random.default_rng(0))
    assert max(rooms) == cap


def test_no_block_spans_the_grid():
    draws = masking._draws(np.random.default_rng(0))
    blocks = [masking._new_block(0, 98, 14, 14, draws) for _ in range(1000)]
    rows = [[(block >> 14 * i & (1 << 14) - 1).bit_count() for i in range(14)] for block in blocks]
    sides = [(sum(width > 0 for width in widths), max(widths)) for widths in rows]
    assert all(h * w == block.bit_count() for (h, w), block in zip(sides, blocks)), "rectangles"
    assert max(map(max, sides)) == 13 and min(map(min, sides)) == 1


def test_masks_depend_on_the_generator_alone_and_advance_it():
    draws = [sample_masks(8, 6, generator=np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*draws)
    ours = torch.Generator().manual_seed(3)
    first, second = sample_masks(8, 6, generator=ours), sample_masks(8, 6, generator=ours)
    assert not torch.equal(first, second) and torch.equal(first, sample_masks(8, 6, generator=ours.manual_seed(3)))


def test_masks_of_odd_sizes_and_shares():
    generator = np.random.default_rng(0)
    masks = sample_masks(200, (4, 10), ratio=(0.2, 0.7), probability=1.0, generator=generator)
    counts = masks.flatten(1).sum(dim=1)
    assert masks.shape == (200, 4, 10) and counts.min() > 0 and counts.max() <= 28 and (counts > 20).any()
    assert all(masks[:, :, i].any() and masks[:, j].any() for i in range(10) for j in range(4)), "no cell is left out"
    assert not sample_masks(6, 8, probability=0.0, generator=generator).any()
    assert sample_masks(7, 8, probability=0.5, generator=generator).flatten(1).any(dim=1).sum() == 3
    assert not sample_masks(6, 8, ratio=(0, 0), probability=1.0, generator=generator).any()
    assert sample_masks(0, 8, generator=generator).shape == (0, 8, 8)
    for tiny in (1, 2, (1, 5), 3):
        masks = sample_masks(50, tiny, ratio=(0.1, 1.0), probability=1.0, generator=generator)
        assert masks.flatten(1).any() == (tiny in (2, 3)), "a block is smaller than the grid, and than half of it"
    assert not sample_masks(0, 1, generator=generator).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": (0.5, 0.1)}, r"the mask ratio must rise within \[0, 1\], as \(0.1, 0.5\) does, got \(0.5, 0.1\)"),
        ({"ratio": (-0.1, 0.5)}, "the mask ratio must rise"),
        ({"ratio": (0.1, 1.5)}, "the mask ratio must rise"),
        ({"probability": 1.5}, r"the mask probability must lie within \[0, 1\], got 1.5"),
        ({"probability": -0.5}, "the mask probability"),
    ],
)
def test_bad_mask_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample_masks(4, 4, generator=np.random.default_rng(0), **options)


@pytest.mark.parametrize("case", ["small", "chunked"])
def test_parameter_rules_equal_the_reference(golden, case):
    g = golden("dinov2/param_groups")
    rates = [g.item(f"{case}.args.{name}") for name in ("layerwise_decay", "patch_embed_lr_mult")]
    names = g._arrays[f"{case}.name"].tolist()
    assert len(names) > 70
    for name, rate, decay, last in zip(
        names, *(g[f"{case}.{key}"].tolist() for key in ("lr_multiplier", "wd_multiplier", "is_last_layer"))
    ):
        parameter = torch.empty(2) if name.endswith((".bias", ".gamma")) or "norm" in name else torch.empty(2, 2)
        place = layered(name, parameter, g.item(f"{case}.args.depth"))
        assert (place.lr_multiplier(*rates), place.decayed, place.last_layer) == (pytest.approx(rate, rel=1e-12), decay == 1, last), name


def test_parameters_that_are_treated_alike_are_one_group():
    vit = small_vit(mask_token=True, registers=2, layer_scale=1e-5)
    head = nn.ModuleDict({"mlp": nn.Linear(24, 8), "last_layer": nn.utils.parametrizations.weight_norm(nn.Linear(8, 4, bias=False))})
    network = nn.ModuleDict({"backbone": vit, "dino_head": head})
    vit.pos_embed.requires_grad_(False)
    groups = layered_param_groups(network, depth=2)
    places = [Layered(*(group[name] for name in Layered._fields)) for group in groups]
    assert places == sorted(set(places)) and {place.lr_multiplier(0.5, 0.2) for place in places} == {0.025, 0.125, 0.25, 0.5, 1.0}
    tokens = groups[places.index(Layered(backbone=True, below=3, patch_embed=False, decayed=True, last_layer=False))]["params"]
    assert {id(p) for p in tokens} == {id(p) for p in (vit.cls_token, vit.mask_token, vit.register_tokens)}
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters() if p.requires_grad), "each once, the frozen not at all"
    torch.optim.AdamW(groups, lr=0.0)
    with pytest.raises(ValueError, match="backbone.blocks.1.norm1.weight is beyond the depth 1"):
        layered_param_groups(network, depth=1)
    cnn = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "dino_head": nn.Linear(4, 2)})
    decayed = {id(p) for group in layered_param_groups(cnn, depth=None) if group["decayed"] for p in group["params"]}
    assert decayed == {id(cnn["backbone"][0].weight), id(cnn["dino_head"].weight)}, "no gain of a batch norm"


def test_clipping_together_is_by_the_common_norm():
    parameters = [nn.Parameter(torch.randn(n, 3)) for n in (4, 9, 16)]
    for max_norm in (3.0, 1e3):
        for parameter in parameters:
            parameter.grad = 5 * torch.randn_like(parameter)
        reference = [nn.Parameter(torch.zeros_like(p)) for p in parameters]
        for parameter, other in zip(parameters, reference):
            other.grad = parameter.grad.clone()
        total = clip_together_(*gradient_norms(parameters), max_norm)
        assert total.item() == pytest.approx(nn.utils.clip_grad_norm_(reference, max_norm).item(), rel=1e-6)
        for parameter, other in zip(parameters, reference):
            torch.testing.assert_close(parameter.grad, other.grad)
