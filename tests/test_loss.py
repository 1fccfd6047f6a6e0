import pytest
import torch

from dino_lightning import DINOLoss
from dino_lightning.training.schedules import linear_warmup


def reference_loss(student, teacher, center, teacher_temp, student_temp=0.1):
    """Equation 1 written pair by pair."""
    n_views = 2 * len(student) // len(teacher)
    targets = torch.softmax((teacher - center) / teacher_temp, dim=-1).chunk(2)
    views = (student / student_temp).chunk(n_views)
    pairs = [(p, s) for i, p in enumerate(targets) for v, s in enumerate(views) if v != i]
    return sum(-(p * s.log_softmax(dim=-1)).sum(dim=-1).mean() for p, s in pairs) / len(pairs)


def test_three_calls_equal_the_reference(golden):
    g = golden("loss")
    start, final, warmup, _ = g["teacher_temp.args"].tolist()
    loss_fn = DINOLoss(g.item("out_dim"))
    for epoch in range(3):
        student = g[f"{epoch}.student"].requires_grad_()
        temp = linear_warmup(epoch, start_value=start, final_value=final, warmup_epochs=int(warmup))
        loss = loss_fn(student, g[f"{epoch}.teacher"], temp)
        loss.backward()
        loss_fn.update_center()
        torch.testing.assert_close(loss.detach(), g[f"{epoch}.loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(student.grad, g[f"{epoch}.grad"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(loss_fn.center, g[f"{epoch}.center_after"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n_views", [2, 3, 10])
def test_loss_and_gradient_in_float64(n_views):
    torch.manual_seed(0)
    student = torch.randn(n_views * 3, 17, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2 * 3, 17, dtype=torch.float64)
    loss_fn = DINOLoss(17).double()
    loss_fn.center.normal_()
    expected = reference_loss(student, teacher, loss_fn.center, 0.05)
    torch.testing.assert_close(loss_fn(student, teacher, 0.05), expected, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda s: loss_fn(s, teacher, 0.05), student)


def test_entropy_and_kl_add_up_to_the_loss():
    torch.manual_seed(0)
    student, teacher = torch.randn(5 * 4, 33), torch.randn(2 * 4, 33)
    loss_fn = DINOLoss(33)
    loss = loss_fn(student, teacher, 0.5)
    targets = torch.softmax(teacher / 0.5, dim=-1).chunk(2)
    views = (student / 0.1).log_softmax(dim=-1).chunk(5)
    kl = [(p * (p.log() - q)).sum(dim=-1).mean() for i, p in enumerate(targets) for v, q in enumerate(views) if v != i]
    torch.testing.assert_close(loss, loss_fn.teacher_entropy + torch.stack(kl).mean())


def test_inputs_are_left_alone():
    student, teacher = torch.randn(12, 9, requires_grad=True), torch.randn(8, 9, requires_grad=True)
    copies = student.detach().clone(), teacher.detach().clone()
    DINOLoss(9)(student, teacher, 0.04).backward()
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])
    assert teacher.grad is None


def test_center_moves_once_per_step_over_all_micro_batches():
    torch.manual_seed(0)
    teacher = torch.randn(2, 6, 11)  # two global views of six images
    whole, parts = DINOLoss(11), DINOLoss(11)
    whole(torch.randn(24, 11), teacher.flatten(0, 1), 0.04)
    for part in teacher.split(2, dim=1):
        parts(torch.randn(8, 11), part.flatten(0, 1), 0.04)
        assert not parts.center.any(), "the centre must not move before the step"
    whole.update_center()
    parts.update_center()
    torch.testing.assert_close(parts.center, whole.center)
    torch.testing.assert_close(whole.center, 0.1 * teacher.mean(dim=(0, 1))[None])
    moved = whole.center.clone()
    assert whole.update_center() is None and torch.equal(whole.center, moved)


def test_center_counts_rows_of_unequal_micro_batches():
    loss_fn = DINOLoss(5)
    a, b = torch.randn(2 * 3, 5), torch.randn(2 * 1, 5)
    for teacher in (a, b):
        loss_fn(teacher.clone(), teacher, 0.04)
    loss_fn.update_center()
    torch.testing.assert_close(loss_fn.center, 0.1 * torch.cat([a, b]).mean(dim=0, keepdim=True))


def test_evaluation_mode_records_nothing():
    loss_fn = DINOLoss(5).eval()
    loss_fn(torch.randn(4, 5), torch.randn(4, 5), 0.04)
    assert loss_fn.update_center() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_float32(dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 4096).to(dtype), torch.randn(8, 4096).to(dtype)
    loss_fn, half = DINOLoss(4096), student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_fn(half, teacher, 0.04)
    full = student.float().requires_grad_()
    expected = DINOLoss(4096)(full, teacher.float(), 0.04)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (loss * 65536).backward()  # the initial factor of a gradient scaler
    (expected * 65536).backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype), rtol=1e-2, atol=1e-6)


def test_non_finite_loss_is_counted_and_leaves_the_centre():
    loss_fn = DINOLoss(5)
    loss_fn(torch.randn(4, 5), torch.randn(4, 5), 0.04)
    assert loss_fn.update_center() == 0
    center = loss_fn.center.clone()
    loss_fn(torch.randn(4, 5), torch.full((4, 5), torch.nan), 0.04)
    assert loss_fn.update_center() == 1
    assert torch.equal(loss_fn.center, center)


def test_extra_memory_is_a_fraction_of_the_pairwise_form():
    """Bytes kept for the backward pass at K = 65,536: the logits themselves and the teacher's distributions, no more."""
    k, batch, n_views = 65536, 2, 10
    student = torch.randn(n_views * batch, k, requires_grad=True)
    teacher = torch.randn(2 * batch, k)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        DINOLoss(k)(student, teacher, 0.04)
    extra = sum(kept.values()) - student.untyped_storage().nbytes()
    assert extra <= 1.01 * teacher.untyped_storage().nbytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reference_loss(student, teacher, torch.zeros(1, k), 0.04)
    assert sum(kept.values()) > 4 * (extra + student.untyped_storage().nbytes()) / 3


@pytest.mark.parametrize(
    "student, teacher, temp, message",
    [
        ((8, 5), (4, 6), 0.04, "expected logits"),
        ((7, 5), (4, 5), 0.04, "V·B student rows"),
        ((2, 5), (4, 5), 0.04, "V ≥ 2"),
        ((8, 5), (3, 5), 0.04, "2·B teacher rows"),
        ((8, 5), (4, 5), 0.0, "teacher_temp must be positive, got 0.0"),
    ],
)
def test_errors(student, teacher, temp, message):
    with pytest.raises(ValueError, match=message):
        DINOLoss(5)(torch.zeros(student), torch.zeros(teacher), temp)
