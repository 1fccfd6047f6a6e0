import pytest

from dino_lightning.training.schedules import cosine_schedule, linear_warmup


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_cosine_equals_the_reference(golden, name):
    g = golden("schedules")
    per_epoch = g.item(f"{name}.niter_per_ep")
    warmup = g.item("lr.warmup_epochs") * per_epoch if name == "lr" else 0
    arguments = dict(
        base_value=g.item(f"{name}.base_value"),
        final_value=g.item(f"{name}.final_value"),
        total_steps=g.item(f"{name}.epochs") * per_epoch,
        warmup_steps=warmup,
    )
    for step, expected in enumerate(g[name].tolist()):
        assert cosine_schedule(step, **arguments) == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_temperature_equals_the_reference(golden):
    g = golden("schedules")
    start, final, warmup, _ = g["teacher_temp.args"].tolist()
    for epoch, expected in enumerate(g["teacher_temp"].tolist()):
        got = linear_warmup(epoch, start_value=start, final_value=final, warmup_epochs=int(warmup))
        assert got == pytest.approx(expected, rel=1e-10)


def test_published_logs_of_the_vanilla_run():
    # Epoch means in the public logs of 8 GPUs × 64, 2502 steps an epoch, 100 epochs.
    def mean(epoch, **kwargs):
        steps = range(epoch * 2502, (epoch + 1) * 2502)
        return sum(cosine_schedule(s, total_steps=250200, **kwargs) for s in steps) / 2502

    lr = dict(base_value=5e-4 * 512 / 256, final_value=1e-6, warmup_steps=25020)
    decay = dict(base_value=0.04, final_value=0.4)
    assert mean(0, **lr) == pytest.approx(4.99820136696111e-05, rel=1e-10)
    assert mean(49, **lr) == pytest.approx(5.958076746498755e-04, rel=1e-10)
    assert mean(99, **lr) == pytest.approx(1.1014922368712136e-06, rel=1e-10)
    assert mean(0, **decay) == pytest.approx(0.04002958960483863, rel=1e-10)
    assert mean(99, **decay) == pytest.approx(0.3999703748959069, rel=1e-10)


def test_ends_of_the_warmup():
    schedule = dict(base_value=1.0, final_value=0.1, total_steps=10, warmup_steps=4)
    assert [cosine_schedule(s, **schedule) for s in (0, 3, 4)] == [0.0, 1.0, 1.0]
    assert cosine_schedule(9, **schedule) > 0.1
    assert cosine_schedule(10, **schedule) == cosine_schedule(99, **schedule) == 0.1
    assert cosine_schedule(0, base_value=1.0, final_value=0.1, total_steps=3, warmup_steps=1) == 0.0
    assert cosine_schedule(2, base_value=1.0, final_value=0.1, total_steps=3, warmup_steps=3) == 1.0
    assert linear_warmup(0, start_value=0.04, final_value=0.07, warmup_epochs=1) == 0.04
    assert linear_warmup(29, start_value=0.04, final_value=0.07, warmup_epochs=30) == pytest.approx(0.07)


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="10 steps is longer than the run of 5"):
        cosine_schedule(0, base_value=1.0, final_value=0.0, total_steps=5, warmup_steps=10)
    with pytest.raises(ValueError, match="-1"):
        cosine_schedule(-1, base_value=1.0, final_value=0.0, total_steps=5)
    with pytest.raises(ValueError, match="-1"):
        linear_warmup(-1, start_value=1.0, final_value=0.0, warmup_epochs=5)
