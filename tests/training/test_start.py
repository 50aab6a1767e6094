"""Tuning: from the model that ships, at two sizes, in parts, and from its own export where the checkpoint is gone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_train_emoji import run, state
from toy_drawings import write_archives

from emoji_training import evaluate, loop, recipe, unet
from emoji_training.card import text
from emoji_training.recipe import TINY
from emoji_training.sprites import Sprites


TUNED = replace(TINY, tuned=True, half_batch=6, unet_fresh=0.4, coarse_until=0.0, judged_halves=True, warmup_steps=4)


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_archives(folder / "archives")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(unet.Trainer, "sample", lambda *arguments: None)
        assert run(folder / "archives", folder, "--stage", "all") == 0
    return folder / "model"


@pytest.fixture
def tune(toy_model: Path, archive_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs stages of a toy tuning, which starts from a toy model and writes over it."""
    monkeypatch.setattr(unet.Trainer, "sample", lambda *arguments: None)
    shutil.copytree(toy_model, tmp_path / "model")
    monkeypatch.setitem(recipe.RECIPES, "tiny", TUNED)
    return lambda *options: run(archive_dir, tmp_path, "--start", str(tmp_path / "model"), *options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a part of a model."""
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def test_a_tuned_model_is_judged_at_both_sizes(tune, tmp_path: Path) -> None:
    model = tmp_path / "model"
    beside = {file: file.read_bytes() for part in ("clip", "tokenizer") for file in (model / part).iterdir()}
    kept = {part: weights(model / part) for part in ("vae", "clip", "unet", "text_encoder")}
    assert tune("--stage", "all") == 0
    for part, before in kept.items():
        after = weights(model / part)
        same = all(torch.equal(after[name], weight) for name, weight in before.items())
        assert same == (part in ("vae", "clip")), part
    assert all(file.read_bytes() == content for file, content in beside.items() if file.suffix != ".safetensors")
    facts, card = json.loads((model / "training.json").read_text()), (model / "README.md").read_text()
    assert facts["before"]["steps"] and facts["unet"]["steps"] == state(tmp_path, "unet")["step"]
    assert f"| stage | time on {facts['machine']} |" in card and "tuned for 64×64 and 32×32 |" in card
    elsewhere = text({**facts, "machine": "a GPU"})
    assert (
        "tuned for 64×64 and 32×32, on a GPU |" in elsewhere and f"time on {facts['before']['machine']} |" in elsewhere
    )
    assert set(facts["judged"]) == set(facts["half"]["judged"]) == {"renders", "mistaken", "1", "2"}
    for side, judged in ((64, facts["judged"]), (32, facts["half"]["judged"])):
        row = next(line for line in card.splitlines() if line.startswith(f"| drawn in 2 steps, {side} pixels"))
        assert row.endswith(f"| {judged['2']['fid']} | {judged['2']['kid']} |")
    assert "64×64 or 32×32" in card and "{" not in card
    pipe = StableDiffusionPipeline.from_pretrained(model)
    for options, side in (({}, 64), ({"height": 32, "width": 32}, 32)):
        image = pipe("a star", num_inference_steps=1, output_type="pt", **options).images
        assert image.shape == (1, 3, side, side)


def test_each_size_is_compared_with_renders_of_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        evaluate, "reference_set", lambda _, sprites, recipe: (recipe.image_size, sprites.images.shape)
    )
    references = evaluate.reference_sets(None, Sprites([], torch.zeros(2, 4, 48, 48, dtype=torch.uint8)), TUNED)
    assert references == {64: (64, (2, 4, 48, 48)), 32: (32, (2, 4, 24, 24))}


def test_each_step_sees_both_sizes(tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, loss = [], unet.Trainer.loss

    def remember(trainer, clean, tokens, fraction):
        seen.append(tuple(clean.shape))
        return loss(trainer, clean, tokens, fraction)

    monkeypatch.setattr(unet.Trainer, "loss", remember)
    assert tune("--stage", "unet") == 0
    assert set(seen) == {(4, 4, 8, 8), (6, 4, 4, 4)}
    assert len(seen) == 2 + 2 * state(tmp_path, "unet")["step"]
    last = state(tmp_path, "unet")["log"][-1]
    assert last["loss"] == pytest.approx((last["full"] + last["half"]) / 2, rel=1e-4)


def test_what_an_interrupted_tuning_exported_is_where_the_next_one_starts(
    tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint may be lost, the schedule goes on."""
    save = loop.Checkpoint.save

    def stop(checkpoint, state):
        save(checkpoint, {key: value for key, value in state.items() if key != "finished"})

    monkeypatch.setattr(loop.Checkpoint, "save", stop)
    assert tune("--stage", "unet", "--minutes", "0.05") == 0
    reached = state(tmp_path, "unet")
    drawn = []
    monkeypatch.setattr(evaluate, "generate", lambda *given: drawn.append(len(given[1])) or unet.generate(*given))
    assert tune("--stage", "judge", "--scenes", "5") == 0
    said = capsys.readouterr().out
    assert f"step {reached['step']}" in said and "| drawn in 2 steps, 32×32 |" in said
    assert drawn == [5, 5, 5, 5], "in one step and in two, at both sizes"
    assert tune("--stage", "export") == 2
    assert tune("--stage", "export", "--unfinished") == 0
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert facts["unet"]["steps"] == reached["step"] and len(facts["unet"]["log"]) == len(reached["log"])

    shutil.rmtree(tmp_path / "work")
    assert tune("--stage", "unet", "--minutes", "0.15", "--resume") == 0
    resumed = state(tmp_path, "unet")
    assert resumed["begun"] == reached["step"] < resumed["step"] and resumed["before"] == facts["before"]
    assert [row["step"] for row in resumed["log"]][: len(reached["log"])] == [row["step"] for row in reached["log"]]
    assert resumed["elapsed"] >= 9


def test_a_start_that_is_no_model_is_explained(
    archive_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(recipe.RECIPES, "tiny", TUNED)
    assert run(archive_dir, tmp_path, "--start", str(tmp_path / "nowhere")) == 2
    assert "holds no model to start from" in capsys.readouterr().err
