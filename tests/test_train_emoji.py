"""The training script of the embedded model: the whole chain in toy sizes, and its errors."""

import io
import itertools
import json
import math
import sys
import tarfile
from pathlib import Path

import pytest
import torch


pytest.importorskip("resvg_py", reason="training renders SVG with resvg-py")
pytest.importorskip("matplotlib", reason="the export stage plots losses")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "apps"))

import train_emoji

from emoji_training import clip, data, unet, vae
from emoji_training.names import COLOURS, HELD_OUT, NAMES, PHRASES, SYNONYMS
from emoji_training.recipe import TINY, Recipe
from emoji_training.text import train_tokenizer


ICONS = {
    "red-heart": '<circle cx="64" cy="64" r="40" fill="#f44336"/>',
    "blue-book": '<path d="M20 20h88v88H20z" fill="#1565c0"/>',
    "star": '<path d="M64 10l50 100H14z" fill="#fdd835"/>',
}


@pytest.fixture
def archive_dir(tmp_path: Path) -> Path:
    """A folder with a small icon archive, in the form `npm pack` leaves."""
    folder = tmp_path / "archives"
    folder.mkdir()
    table = {"width": 128, "height": 128, "icons": {name: {"body": body} for name, body in ICONS.items()}}
    raw = json.dumps(table).encode()
    with tarfile.open(folder / "iconify-json-noto-1.0.0.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(raw)
        tar.addfile(info, io.BytesIO(raw))
    return folder


def run(archive_dir: Path, tmp_path: Path, *more: str) -> int:
    """The script in toy sizes."""
    common = ["--data-dir", str(archive_dir), "--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "model")]
    return train_emoji.main([*common, "--tiny", "--names", ",".join(ICONS), *more])


def state(tmp_path: Path, stage: str) -> dict:
    """The state a stage's checkpoint holds."""
    return json.loads((tmp_path / "work" / stage / "state.json").read_text())


def test_timesteps_cover_the_range_and_later_dwell_on_its_noisy_end() -> None:
    recipe = Recipe()
    early = unet.draw_times(16, 1000, recipe, fraction=0.0)
    assert all(index * 62.5 - 1 <= time < (index + 1) * 62.5 for index, time in enumerate(sorted(early.tolist())))
    late = unet.draw_times(16, 1000, recipe, fraction=0.9)
    assert late.min() >= 0
    assert late.max() < 1000
    assert sum(time >= 650 for time in late[4:].tolist()) == 12
    assert late[:4].min() < 250 <= late[:4].max()


def test_whole_chain(archive_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel

    assert run(archive_dir, tmp_path, "--stage", "all") == 0
    assert all(state(tmp_path, stage)["finished"] for stage in ("vae", "unet", "clip"))
    model = tmp_path / "model"
    card = (model / "README.md").read_text()
    facts = json.loads((model / "training.json").read_text())
    assert facts["names"] == list(ICONS) and f"{facts['vae']['psnr_trained']} dB" in card
    assert card.startswith("---\nlicense: apache-2.0") and "{" not in card.replace("{count}", "")
    assert (model / "samples.png").stat().st_size and (model / "loss.png").stat().st_size
    for keywords in ({}, {"torch_dtype": torch.float16}):
        pipe = StableDiffusionPipeline.from_pretrained(model, **keywords)
        wanted = keywords.get("torch_dtype", torch.float32)
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {wanted}
        image = pipe("a red heart", num_inference_steps=1, output_type="pt").images
        assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
    encoder = CLIPModel.from_pretrained(model / "clip", use_safetensors=True)
    assert encoder.dtype == torch.float32
    texts = StableDiffusionPipeline.from_pretrained(model).text_encoder.state_dict()
    assert all(torch.equal(value, texts[name]) for name, value in encoder.text_model.state_dict().items())


@pytest.mark.parametrize("stage", ["vae", "unet", "clip"])
def test_resume_goes_on_where_a_crash_left_off(
    stage: str, archive_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"vae": vae, "unet": unet, "clip": clip}
    for earlier in itertools.takewhile(lambda name: name != stage, stages):
        assert run(archive_dir, tmp_path, "--stage", earlier, "--minutes", "0.01") == 0
    module = stages[stage]
    ticks = module.ticks

    def crash(clock, label):
        yield from itertools.islice(ticks(clock, label), 4)
        raise KeyboardInterrupt

    def eager(folder, models, optimizer, every):
        return checkpoint(folder, models, optimizer, 0.0)

    checkpoint = module.Checkpoint
    monkeypatch.setattr(module, "Checkpoint", eager)
    monkeypatch.setattr(module, "ticks", crash)
    with pytest.raises(KeyboardInterrupt):
        run(archive_dir, tmp_path, "--stage", stage, "--minutes", "5")
    crashed = state(tmp_path, stage)
    assert crashed["step"] == 4 and not crashed.get("finished")

    monkeypatch.setattr(module, "ticks", lambda clock, label: itertools.islice(ticks(clock, label), 3))
    assert run(archive_dir, tmp_path, "--stage", stage, "--minutes", "5", "--resume") == 0
    resumed = state(tmp_path, stage)
    assert resumed["step"] == 7 and resumed["elapsed"] > crashed["elapsed"] and resumed["finished"]

    assert run(archive_dir, tmp_path, "--stage", stage, "--resume") == 0
    assert state(tmp_path, stage) == resumed, "a finished stage is left as it is"


def test_the_contrastive_loss_pairs_each_picture_with_its_own_text() -> None:
    images, texts = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).double().unbind()
    scale = torch.tensor(7.0, dtype=torch.float64)
    losses = []
    for first, second in ((images, texts), (texts, images)):
        for row in range(6):
            cosines = [float(first[row] @ other / first[row].norm() / other.norm()) for other in second]
            losses.append(math.log(sum(math.exp(7 * value) for value in cosines)) - 7 * cosines[row])
    assert float(clip.contrastive_loss(images, texts, scale)) == pytest.approx(sum(losses) / 12)
    assert clip.contrastive_loss(images, 3 * images, 10 * scale) < 0.01 < clip.contrastive_loss(images, texts, scale)


def test_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    from emoji_training.loop import Checkpoint

    model = torch.nn.Linear(2, 2)
    keep = Checkpoint(tmp_path / "stage", {"m": model}, torch.optim.AdamW(model.parameters()), 0.0)
    keep.save({"step": 1})
    (tmp_path / "stage").rename(tmp_path / "stage.old")  # as if the machine stopped between the two renames
    (tmp_path / "stage.new").mkdir()
    assert keep.load() == {"step": 1}


def test_standardised_latents_decode_alike() -> None:
    torch.manual_seed(0)
    model = vae.build_vae(TINY).eval()
    for parameter in model.quant_conv.parameters():
        torch.nn.init.normal_(parameter)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    before = vae.reconstruct(model, images)
    vae.standardise_latents(model, images, torch.device("cpu"))
    after = vae.reconstruct(model, images)
    latents = torch.cat([model.encode(vae.to_float(images)).latent_dist.mean])
    assert (before.int() - after.int()).abs().max() <= 1
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.05 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05


def test_every_prompt_tokenizes() -> None:
    tokenizer = train_tokenizer(["a red apple", "an emoji of a red apple"], Recipe().vocabulary)
    for prompt in ("a red apple", "", "ünïcödé 漢字 🍎", "x" * 300, "a\tb\nc  1234!?"):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids
        assert len(tokens) == 77 and tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
        assert max(tokens) < len(tokenizer)
        inner = tokenizer(prompt).input_ids[1:-1]
        assert tokenizer.unk_token_id not in inner, "no byte is unknown"


def test_captions_read_well() -> None:
    assert data.prompt_of("red-apple") == "a red apple"
    assert data.prompt_of("octopus") == "an octopus"
    assert data.prompt_of("french-fries") == "french fries"
    assert "a yellow banana" in data.captions_of("banana") and "an emoji of a cat" in data.captions_of("cat-face")
    assert not (set(PHRASES) | set(SYNONYMS) | set(COLOURS)) - set(NAMES)
    assert len(set(NAMES)) == len(NAMES) and not set(NAMES) & set(HELD_OUT)
    assert len({data.prompt_of(name) for name in NAMES}) == len(NAMES)


def test_missing_data_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ["--work-dir", str(tmp_path / "work")]
    assert train_emoji.main(["--data-dir", str(tmp_path / "nowhere"), *work]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert train_emoji.main(["--data-dir", str(tmp_path), *work]) == 2
    assert "npm pack" in capsys.readouterr().err
    (tmp_path / "iconify-json-noto-1.0.0.tgz").write_bytes(b"not an archive")
    assert train_emoji.main(["--data-dir", str(tmp_path), *work]) == 2
    assert "no icon archive" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    assert train_emoji.main(work) == 2
    assert "npm is not installed" in capsys.readouterr().err


def test_unknown_name_and_missing_stage_are_explained(
    archive_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(archive_dir), "--work-dir", str(tmp_path / "work")]
    assert train_emoji.main([*where, "--names", "red-heart,no-such-thing"]) == 2
    assert "'no-such-thing'" in capsys.readouterr().err
    assert train_emoji.main([*where, "--names", "red-heart", "--tiny", "--stage", "unet"]) == 2
    assert "--stage vae" in capsys.readouterr().err
