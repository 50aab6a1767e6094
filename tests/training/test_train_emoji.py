"""The training script: the whole chain in toy sizes, resuming, and its errors."""

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_drawings import TAUGHT
from train_emoji import main

from emoji_training import archives, clip, loop, unet, vae
from emoji_training.archives import DataError, Icon
from emoji_training.recipe import TINY
from emoji_training.sprites import render


def run(archive_dir: Path, tmp_path: Path, *more: str) -> int:
    """The script in toy sizes."""
    common = ["--data-dir", str(archive_dir), "--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "model")]
    return main([*common, "--recipe", "tiny", *more])


def state(tmp_path: Path, stage: str) -> dict:
    """The state a stage's checkpoint holds."""
    return json.loads((tmp_path / "work" / stage / "state.json").read_text())


def test_whole_chain(archive_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel

    from agentsd.bench.set_metrics import ReferenceSet

    assert run(archive_dir, tmp_path, "--stage", "all") == 0
    assert all(state(tmp_path, stage)["finished"] for stage in ("vae", "clip", "unet"))
    assert list((tmp_path / "work" / "samples").glob("step-*.png")), "looked at while it trained"
    model = tmp_path / "model"
    card = (model / "README.md").read_text()
    facts = json.loads((model / "training.json").read_text())
    assert facts["names"] == list(TAUGHT) and facts["styles"] == {"noto": 3, "flat": 3, "3d": 3}
    assert f"{facts['vae']['psnr']} dB" in card and f"| {facts['judged']['2']['fid']} |" in card
    assert len(set(facts["prompts"])) == TINY.judged_scenes
    assert card.startswith("---\nlicense: apache-2.0") and "{" not in card
    assert (model / "samples.png").stat().st_size and (model / "loss.png").stat().st_size
    assert {path.stat().st_mode & 0o777 for path in model.rglob("*.safetensors")} == {0o644}
    for keywords in ({}, {"torch_dtype": torch.float16}):
        pipe = StableDiffusionPipeline.from_pretrained(model, **keywords)
        wanted = keywords.get("torch_dtype", torch.float32)
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {wanted}
        image = pipe("a red heart", num_inference_steps=1, output_type="pt").images
        assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
    for part, kept, raw in (("unet", "ema_unet", "unet"), ("text_encoder", "ema_text", "text")):
        averaged, current = (load_file(tmp_path / "work" / "unet" / f"{name}.safetensors") for name in (kept, raw))
        shipped = getattr(pipe, part).state_dict()  # in half precision, as in the files
        assert all(torch.equal(shipped[name].half(), weight.half()) for name, weight in averaged.items())
        assert any(not torch.equal(weight, current[name]) for name, weight in averaged.items())
    start = load_file(tmp_path / "work" / "clip" / "clip.safetensors")
    assert any(not torch.equal(weight, start[f"text_model.{name}"]) for name, weight in averaged.items())
    encoder = CLIPModel.from_pretrained(model / "clip", use_safetensors=True)
    assert encoder.dtype == torch.float32
    reference = ReferenceSet.load(model / "clip" / "reference.safetensors")
    assert reference.rows.shape == (TINY.reference_rows, TINY.clip_width)


def test_small_images_come_first(archive_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, loss, renew, renewed = set(), unet.Trainer.loss, unet.LatentPool.renew, []

    def remember(trainer, clean, tokens, fraction):
        if fraction:  # else it only warms up
            seen.add((fraction < TINY.coarse_until, clean.shape[0], clean.shape[-1]))
        return loss(trainer, clean, tokens, fraction)

    monkeypatch.setattr(unet.Trainer, "loss", remember)
    monkeypatch.setattr(unet.LatentPool, "renew", lambda pool: (renewed.append(pool.factor), renew(pool)))
    monkeypatch.setattr(unet.Trainer, "sample", lambda *arguments: None)
    for stage in ("vae", "clip", "unet"):
        assert run(archive_dir, tmp_path, "--stage", stage, "--minutes", "0.03") == 0
    assert seen == {(True, 16, 4), (False, 4, 8)}
    assert len(renewed) == state(tmp_path, "unet")["step"] and set(renewed) == {4, 1}


@pytest.mark.parametrize("stage", ["vae", "clip", "unet"])
def test_resume_goes_on_where_a_crash_left_off(
    stage: str,
    archive_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = {"vae": vae, "clip": clip, "unet": unet}
    for earlier in itertools.takewhile(lambda name: name != stage, stages):
        assert run(archive_dir, tmp_path, "--stage", earlier, "--minutes", "0.01") == 0
    module, steps = stages[stage], loop.Progress.__iter__

    def crash(progress):
        yield from itertools.islice(steps(progress), 4)
        raise KeyboardInterrupt

    def eager(folder, models, optimizer, every):
        return checkpoint(folder, models, optimizer, 0.0)

    checkpoint = module.Checkpoint
    monkeypatch.setattr(module, "Checkpoint", eager)
    monkeypatch.setattr(loop.Progress, "__iter__", crash)
    with pytest.raises(KeyboardInterrupt):
        run(archive_dir, tmp_path, "--stage", stage, "--minutes", "5")
    crashed = state(tmp_path, stage)
    assert crashed["step"] == 4 and not crashed.get("finished")
    after = {"vae": "clip", "clip": "unet", "unet": "export"}[stage]
    assert run(archive_dir, tmp_path, "--stage", after, "--minutes", "5") == 2
    assert f"run --stage {stage} --resume first" in capsys.readouterr().err

    monkeypatch.setattr(loop.Progress, "__iter__", lambda progress: itertools.islice(steps(progress), 3))
    assert run(archive_dir, tmp_path, "--stage", stage, "--minutes", "5", "--resume") == 0
    resumed = state(tmp_path, stage)
    assert resumed["step"] == 7 and resumed["elapsed"] > crashed["elapsed"] and resumed["finished"]

    assert run(archive_dir, tmp_path, "--stage", stage, "--resume") == 0
    assert state(tmp_path, stage) == resumed, "a finished stage is left as it is"
    if stage == "unet":
        assert run(archive_dir, tmp_path, "--stage", stage, "--minutes", "6", "--resume") == 0
        assert state(tmp_path, stage)["step"] == 10, "unless it is to have more time than before"


def test_missing_data_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ["--work-dir", str(tmp_path / "work")]
    assert main(["--data-dir", str(tmp_path / "nowhere"), *work]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["--data-dir", str(tmp_path), *work]) == 2
    assert "npm pack" in capsys.readouterr().err
    (tmp_path / "iconify-json-noto-1.0.0.tgz").write_bytes(b"not an archive")
    assert main(["--data-dir", str(tmp_path), *work]) == 2
    assert "no icon archive" in capsys.readouterr().err
    broken = Icon("noto", "torn", "<path", 1, 1)
    with pytest.raises(DataError, match="'torn' of style 'noto' cannot be rendered"):
        render(broken, 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archives.shutil, "which", lambda name: None)
    assert main(work) == 2
    assert "npm is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "resvg_py"])
def test_a_missing_package_is_explained(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("emoji_training", package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"^error: {package} is not installed: `pip install"):
        runpy.run_path(sys.modules[main.__module__].__file__)


def test_unknown_name_and_missing_stage_are_explained(
    archive_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(archive_dir), "--work-dir", str(tmp_path / "work")]
    assert main([*where, "--names", "red-heart,no-such-thing"]) == 2
    assert "'no-such-thing'" in capsys.readouterr().err
    for stage, needed in (("unet", "--stage vae"), ("clip", "--stage vae"), ("export", "--stage unet")):
        assert main([*where, "--names", "red-heart", "--recipe", "tiny", "--stage", stage]) == 2
        assert needed in capsys.readouterr().err
