"""What the training stages share: the rate, checkpoints, the loss log, a step."""

from pathlib import Path

import pytest
import torch
import toy_drawings  # noqa: F401  (skips these tests where a package is missing)

from emoji_training import loop


def test_the_rate_warms_up_and_falls() -> None:
    """Linearly over the first steps, then as a cosine over the time."""
    early = [loop.learning_rate(1.0, 0.0, step, 200) for step in (0, 99, 199, 10**5)]
    assert early == pytest.approx([0.005, 0.5, 1, 1])
    assert [loop.learning_rate(2.0, part, 10**5, 200) for part in (0.0, 0.5, 1.0)] == pytest.approx([2, 1.01, 0.02])


def test_the_rate_can_be_held() -> None:
    rates = [loop.learning_rate(2.0, part, 10**5, 200, hold=0.6) for part in (0.0, 0.6, 0.8, 1.0)]
    assert rates == pytest.approx([2, 2, 1.01, 0.02])


@pytest.mark.parametrize("device, elapsed", [("cpu", [6, 9, 10]), ("cuda", [6, 906, 907])])
def test_a_stopped_process_loses_no_time(device: str, elapsed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    wall, processor = iter([100.0, 102.0, 1002.0, 1003.0]), iter([50.0, 54.0, 57.0, 59.0])
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(wall))
    monkeypatch.setattr(loop.time, "process_time", lambda: next(processor))
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device(device))
    clock, found = loop.Clock(minutes=1, elapsed=4.0), []
    for _ in range(3):
        clock.end_step()
        found.append(clock.elapsed)
    assert found == elapsed
    assert clock.fraction == min(1, elapsed[-1] / 60)


def test_the_loss_log_holds_means(capsys: pytest.CaptureFixture[str]) -> None:
    kept = loop.new_state()
    progress = loop.Progress("stage", kept, minutes=1, log_steps=3)
    for number, _ in zip(range(1, 8), progress, strict=False):
        progress.end_step({"loss": torch.tensor(float(number))})
    assert [(row["step"], row["loss"]) for row in kept["log"]] == [(1, 1.0), (3, 2.5), (6, 5.0)]


def test_a_batch_gone_wrong_changes_nothing() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    loop.descend(model(torch.ones(1, 2)).sum(), optimizer)
    before = model.weight.clone()
    loop.descend(model(torch.full((1, 2), torch.inf)).sum(), optimizer)
    assert torch.equal(model.weight, before)
    loop.descend(model(torch.ones(1, 2)).sum(), optimizer)
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)


def test_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    keep = loop.Checkpoint(tmp_path / "stage", {"m": model}, torch.optim.AdamW(model.parameters()), 0.0)
    keep.save({"step": 1})
    (tmp_path / "stage").rename(tmp_path / "stage.old")  # as if the machine stopped between the two renames
    (tmp_path / "stage.new").mkdir()
    assert keep.load() == {"step": 1}


def test_a_checkpoint_brings_back_weights_and_optimizer(tmp_path: Path) -> None:
    def stage() -> tuple[torch.nn.Linear, torch.optim.Optimizer, loop.Checkpoint]:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        return model, optimizer, loop.Checkpoint(tmp_path / "stage", {"m": model}, optimizer, 0.0)

    model, optimizer, keep = stage()
    loop.descend(model(torch.ones(1, 2)).sum(), optimizer)
    keep.save({"step": 1})
    other, its_optimizer, again = stage()
    assert again.load() == {"step": 1}
    assert torch.equal(other.weight, model.weight)
    kept, found = optimizer.state[model.weight], its_optimizer.state[other.weight]
    assert torch.equal(found["exp_avg"], kept["exp_avg"]) and found["step"] == kept["step"] == 1
