"""The parts of DINOv2's objective against the reference's golden numbers, and what must hold beyond them."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN

from dino_lightning.losses import Centering, IBOTLoss, KoLeoLoss, dino_terms, sinkhorn_knopp
from dino_lightning.losses import cross_entropy as rows_file
from dino_lightning.losses.cross_entropy import cross_entropy


def close(actual, expected, rtol=1e-5, atol=0.0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def close_gradient(actual, expected):
    close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# The cross-entropy of each row


@pytest.mark.parametrize("chunk", [3 * 17, 2**18])
@pytest.mark.parametrize("pairs", [((0,),), ((1,), (0,), (0, 1), (0, 1))])
def test_each_row_against_the_plain_form_in_float64(pairs, chunk, monkeypatch):
    """Chunks of three of five rows, too; the rows are weighted outside."""
    monkeypatch.setattr(rows_file, "_CPU_CHUNK", chunk)
    torch.manual_seed(0)
    student = torch.randn(len(pairs) * 5, 17, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(max(map(max, pairs)) * 5 + 5, 17, dtype=torch.float64).softmax(dim=1)
    weights = torch.rand(len(student), dtype=torch.float64)
    blocks = targets.split(5)
    sums = torch.cat([sum(blocks[i] for i in pair) for pair in pairs])
    plain = -(sums * (student / 0.2).log_softmax(dim=1)).sum(dim=1)
    rows = cross_entropy(student, targets, 0.2, pairs)
    close(rows, plain, rtol=1e-13)
    (expected,), (actual,) = (torch.autograd.grad(weights @ losses, student) for losses in (plain, rows))
    close(actual, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda s: cross_entropy(s, targets, 0.2, pairs), student)


# DINO's terms


def test_dino_terms_equal_the_reference(golden):
    g = golden("dinov2/losses")
    views = torch.cat([g["dino.student_global"], g["dino.student_local"]]).requires_grad_()
    global_term, local_term = dino_terms(views, g["dino.teacher_probs"])
    (global_term + local_term).backward()
    close(global_term.detach(), g["dino.loss_global"])
    close(local_term.detach(), g["dino.loss_local"])
    close_gradient(views.grad, torch.cat([g["dino.grad_global"], g["dino.grad_local"]]))


def test_two_views_have_no_local_term():
    student, targets = torch.randn(6, 9, requires_grad=True), torch.rand(6, 9).softmax(dim=1)
    global_term, local_term = dino_terms(student, targets)
    assert local_term == 0 and global_term.dtype == local_term.dtype == torch.float32
    first, second = targets.chunk(2)
    crossed = -(torch.cat([second, first]) * (student / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
    close(global_term, crossed)
    (global_term + local_term).backward()


@pytest.mark.parametrize(
    "student, targets, temp, message",
    [
        ((8, 5), (4, 6), 0.1, r"got \(8, 5\) and \(4, 6\)"),
        ((7, 5), (4, 5), 0.1, "got 4 and 7"),
        ((8, 5), (4, 5), 0.0, "student_temp must be positive, got 0.0"),
    ],
)
def test_errors_of_dino_terms(student, targets, temp, message):
    with pytest.raises(ValueError, match=message):
        dino_terms(torch.zeros(student), torch.zeros(targets), temp)


# iBOT


def test_ibot_equals_the_reference(golden):
    g = golden("dinov2/losses")
    student = g["ibot.student"].requires_grad_()
    loss = IBOTLoss()(student, g["ibot.teacher_probs"], g["ibot.masks"])
    loss.backward()
    close(loss.detach(), g["ibot.loss"])
    close_gradient(student.grad, g["ibot.grad"])


@pytest.fixture
def patches():
    """Four crops of nine patches: one, six and no patch masked, and two; their logits and targets in float64."""
    torch.manual_seed(0)
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[0, 4] = masks[1, 2:8] = masks[3, 0] = masks[3, 8] = True
    student = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(9, 7, dtype=torch.float64).softmax(dim=1), masks


def test_ibot_equals_a_loop_over_crops_and_patches(patches):
    student, targets, masks = patches
    loss, row = 0.0, 0
    for mask in masks:
        terms = []
        for _ in range(int(mask.sum())):
            terms.append(-(targets[row] * (student[row] / 0.1).log_softmax(dim=0)).sum())
            row += 1
        loss += sum(terms) / max(len(terms), 1) / len(masks)
    close(IBOTLoss()(student, targets, masks), loss, rtol=1e-13)
    assert torch.autograd.gradcheck(lambda s: IBOTLoss()(s, targets, masks), student)


def test_crops_weigh_the_same_whatever_their_masks(patches):
    """Rows that are all alike: a crop with one masked patch counts as one with six."""
    student, targets, masks = (x.detach() for x in patches)
    student[0], targets[0], student[1:7], targets[1:7] = student[7], targets[7], student[8], targets[8]
    each = cross_entropy(student[7:], targets[7:], 0.1)
    close(IBOTLoss()(student[:7], targets[:7], masks[:2]), each.mean(), rtol=1e-12)


def test_no_mask_gives_zero_and_a_backward_pass():
    student = torch.randn(3, 7, requires_grad=True)
    loss = IBOTLoss()(student[:0], torch.empty(0, 7), torch.zeros(4, 9, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ibot_is_in_float32_under_autocast(patches, dtype):
    student, targets, masks = patches[0].detach().to(dtype).requires_grad_(), patches[1].float(), patches[2]
    with torch.autocast("cpu", dtype=dtype):
        loss = IBOTLoss()(student, targets, masks)
    loss.backward()
    close(loss, IBOTLoss()(student.float(), targets, masks), rtol=1e-6)
    assert loss.dtype == torch.float32 and student.grad.dtype == dtype


def test_errors_of_ibot(patches):
    student, targets, masks = patches
    with pytest.raises(ValueError, match="one row for each of 9 masked patches, got 8"):
        IBOTLoss()(student[:8], targets[:8], masks)
    with pytest.raises(ValueError, match=r"got \(9, 7\), \(8, 7\) and \(4, 9\)"):
        IBOTLoss()(student, targets[:8], masks)
    with pytest.raises(ValueError, match=r"and \(4, 3, 3\)"):
        IBOTLoss()(student, targets, masks.unflatten(1, (3, 3)))
    with pytest.raises(ValueError, match="student_temp must be positive, got -1"):
        IBOTLoss(-1)


# KoLeo


def test_koleo_equals_the_reference(golden):
    g = golden("dinov2/losses")
    x, loss_fn = g["koleo.x"].requires_grad_(), KoLeoLoss()
    each = torch.stack([loss_fn(view) for view in x.chunk(2)])
    each.sum().backward()
    close(each.detach(), g["koleo.each"])
    close(each.sum().detach(), g["koleo.loss"])
    close_gradient(x.grad, g["koleo.grad"])
    close(loss_fn(g["koleo.twins.x"]), g["koleo.twins.loss"], rtol=1e-3)


def test_koleo_finds_the_nearest_neighbour():
    angles = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    x = 3 * torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    loss_fn = KoLeoLoss()
    assert loss_fn.distance is None
    chords = 2 * torch.tensor([0.05, 0.05, 0.45], dtype=torch.float64).sin()
    close(loss_fn(x).detach(), -chords.log().mean(), rtol=1e-6)
    close(loss_fn.distance, chords.mean(), rtol=1e-6)
    assert not loss_fn.distance.requires_grad and torch.autograd.gradcheck(loss_fn, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_is_finite_for_equal_images(dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 32).to(dtype)
    x[1], x[3], x[5] = x[0], x[2], x[2]  # two that are equal, and three
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = KoLeoLoss()(x)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()
    close(loss, KoLeoLoss()(x.float()), rtol=1e-6)


def test_opposite_images_are_neighbours_too():
    """Not each its own: rounding puts their cosine below −1."""
    x = torch.full((2, 6), 0.1)
    x[1] *= -1
    loss_fn = KoLeoLoss()
    close(loss_fn(x), -torch.tensor(2.0).log(), rtol=1e-6)


def test_one_image_has_no_neighbour():
    x, loss_fn = torch.randn(1, 8, requires_grad=True), KoLeoLoss()
    loss = loss_fn(x)
    loss.backward()
    assert loss == 0 and not x.grad.any() and loss_fn.distance is None
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\)"):
        loss_fn(torch.zeros(2, 3, 4))


# Sinkhorn–Knopp


def plain_sinkhorn(logits, temp, iterations=3):
    q = torch.exp(logits.double() / temp)
    for _ in range(iterations):
        q = q / q.sum(dim=0)
        q = q / q.sum(dim=1, keepdim=True)
    return q


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("kind", ["class", "patch"])
def test_sinkhorn_equals_the_reference(golden, case, kind):
    g = golden("dinov2/sinkhorn")
    logits = g[f"{case}.{kind}.logits"]
    before = logits.clone()
    close(sinkhorn_knopp(logits, g.item(f"{case}.temp")), g[f"{case}.{kind}.out"], rtol=1e-4, atol=1e-9)
    assert torch.equal(logits, before)
    close(sinkhorn_knopp(logits.half(), g.item(f"{case}.temp")), g[f"{case}.{kind}.out"], rtol=1e-4, atol=1e-9)


def test_rows_sum_to_one_and_prototypes_become_equal():
    torch.manual_seed(0)
    logits = torch.randn(40, 10, dtype=torch.float64, requires_grad=True)
    few, many = sinkhorn_knopp(logits, 0.5), sinkhorn_knopp(logits, 0.5, iterations=200)
    assert few.dtype == torch.float64 and not few.requires_grad
    for p in (few, many):
        close(p.sum(dim=1), torch.ones(40, dtype=torch.float64), rtol=1e-13)
    close(many.sum(dim=0), torch.full((10,), 4.0, dtype=torch.float64), rtol=1e-10)
    close(few, plain_sinkhorn(logits, 0.5), rtol=1e-12)


def test_sinkhorn_is_exact_far_beyond_the_exponential_of_float32():
    """Exponents that span 350 in every row and column, and rows whose largest ones lie 300 apart, which float64 holds."""
    torch.manual_seed(0)
    logits = 7 * torch.rand(24, 16) - torch.linspace(0, 6, 24)[:, None] + torch.linspace(0, 6, 16)
    close(sinkhorn_knopp(logits, 0.04), plain_sinkhorn(logits, 0.04).float(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_sinkhorn_is_finite_whatever_the_logits(scale):
    torch.manual_seed(0)
    logits = scale * (2 * torch.rand(12, 32) - 1)
    logits[0], logits[1], logits[:, 0], logits[:, 1] = scale, -scale, -scale, scale
    for iterations in (1, 3, 20):
        p = sinkhorn_knopp(logits, 0.04, iterations)
        assert p.isfinite().all()
        close(p.sum(dim=1), torch.ones(12))


def test_autocast_leaves_sinkhorn_alone(golden):
    g = golden("dinov2/sinkhorn")
    logits = g["1.patch.logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn_knopp(logits, 0.055)
    assert torch.equal(inside, sinkhorn_knopp(logits, 0.055))


def test_sinkhorn_without_rows_and_its_errors():
    assert sinkhorn_knopp(torch.empty(0, 5), 0.04).shape == (0, 5)
    for arguments, message in (
        ((torch.zeros(5), 0.04), r"got \(5,\)"),
        ((torch.zeros(2, 5), 0.0), "temperature must be positive, got 0.0"),
        ((torch.zeros(2, 5), 0.04, 0), "iterations must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn_knopp(*arguments)


# Centring


@pytest.mark.parametrize("kind, k", [("class", 64), ("patch", 48)])
def test_three_steps_of_centering_equal_the_reference(golden, kind, k):
    g, centering = golden("dinov2/centering"), Centering(k)
    for step in range(3):
        logits, temp = g[f"{step}.{kind}.logits"], g.item(f"{step}.temp")
        p = centering(logits, temp)
        close(p, g[f"{step}.{kind}.out"], rtol=1e-4, atol=1e-9)
        centering.update_center()
        close(centering.center[0], g[f"{step}.{kind}.center_after"], rtol=1e-5, atol=1e-7)


def test_the_centre_moves_once_over_micro_batches_of_unequal_size():
    torch.manual_seed(0)
    logits, centering = torch.randn(9, 5), Centering(5, momentum=0.8)
    for part in logits.split([6, 0, 3]):
        centering(part.half(), 0.1)
        assert not centering.center.any()
    centering.update_center()
    moved = centering.center.clone()
    close(moved, 0.2 * logits.mean(dim=0, keepdim=True), rtol=1e-2, atol=1e-4)
    centering.update_center()
    centering.eval()(logits, 0.1)
    centering.update_center()
    assert torch.equal(centering.center, moved), "committed already, and evaluation mode records nothing"


def test_when_the_centre_stays():
    centering = Centering(5)
    rows = torch.randn(4, 5)
    bad = rows.clone()
    bad[2, 3] = torch.inf
    for logits, keep in ((bad, None), (rows, torch.tensor(True)), (rows[:0], None)):
        centering(logits, 0.1)
        centering.update_center(keep)
        assert not centering.center.any()
    centering(bad, 0.1)
    centering.reset()
    centering(rows, 0.1)
    centering.update_center(torch.tensor(False))
    close(centering.center, 0.1 * rows.mean(dim=0, keepdim=True))
    assert list(centering.state_dict()) == ["center"]


def test_errors_of_centering():
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        Centering(5, momentum=1.5)
    with pytest.raises(ValueError, match=r"expected logits \(rows, 5\), got \(4, 6\)"):
        Centering(5)(torch.zeros(4, 6), 0.1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        Centering(5)(torch.zeros(4, 5), 0)


# Two ranks

RANK = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from dino_lightning.losses import Centering, sinkhorn_knopp

folder, golden, rank = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
temp = golden["ranks.temp"].item()
patches = torch.from_numpy(golden[f"ranks.{rank}.patch.logits"]).float()
result = {
    "class": sinkhorn_knopp(torch.from_numpy(golden[f"ranks.{rank}.class.logits"]).float(), temp),
    "patch": sinkhorn_knopp(patches, temp),
    "rowless": sinkhorn_knopp(patches if rank == 0 else patches[:0], temp),
}
centering = Centering(40)
bad = patches if rank == 0 else patches.log()
for name, logits in {"both": patches, "one": patches if rank == 0 else patches[:0], "bad": bad}.items():
    centering(logits, temp)
    centering.update_center()
    result[f"center.{name}"] = centering.center.clone()
torch.save(result, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes (gloo) write, which have 11 and 4 masked patches."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-c", RANK, folder, GOLDEN / "dinov2" / "sinkhorn.npz"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True, env=environment) for rank in ("0", "1")]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert not any(process.returncode for process in running), errors
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_sinkhorn_on_two_ranks_equals_the_reference_and_one_process(golden, ranks):
    g = golden("dinov2/sinkhorn")
    temp = g.item("ranks.temp")
    for kind in ("class", "patch"):
        for rank, result in enumerate(ranks):
            close(result[kind], g[f"ranks.{rank}.{kind}.out"], rtol=1e-4, atol=1e-9)
        whole = sinkhorn_knopp(torch.cat([g[f"ranks.{rank}.{kind}.logits"] for rank in (0, 1)]), temp)
        close(torch.cat([result[kind] for result in ranks]), whole)
    assert ranks[1]["rowless"].shape == (0, 40)
    close(ranks[0]["rowless"], sinkhorn_knopp(g["ranks.0.patch.logits"], temp))


def test_the_centre_of_two_ranks_is_the_mean_of_their_means(golden, ranks):
    g = golden("dinov2/sinkhorn")
    means = [g[f"ranks.{rank}.patch.logits"].mean(dim=0, keepdim=True) for rank in (0, 1)]
    both = 0.1 * (means[0] + means[1]) / 2
    one = 0.9 * both + 0.1 * (means[0] + both) / 2  # the rank without rows counts as the centre
    for result in ranks:
        close(result["center.both"], both, atol=1e-7)
        close(result["center.one"], one, atol=1e-7)
        assert torch.equal(result["center.bad"], result["center.one"]), "not finite on one rank: it stays on both"
