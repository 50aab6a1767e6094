"""The training script of the embedded model: the whole chain in toy sizes, and its errors."""

import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("resvg_py", reason="training renders SVG with resvg-py")
pytest.importorskip("matplotlib", reason="the export stage plots losses")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "apps"))

import train_emoji

from emoji_training import archives, clip, loop, unet, vae
from emoji_training.archives import PACKAGES, DataError, Icon, gather_icons, is_taught
from emoji_training.captions import Captions, distinct_scenes, with_article
from emoji_training.compose import compose
from emoji_training.evaluate import hit_rates
from emoji_training.names import COLOURS, HELD_OUT, NAMES, PHRASES, SYNONYMS
from emoji_training.pictures import to_bytes, to_float
from emoji_training.recipe import FULL, SMALL, TINY
from emoji_training.scenes import COLOURS as PALETTE
from emoji_training.scenes import Background, Scene, SceneSource, Thing
from emoji_training.sprites import Sprites, load_sprites, render
from emoji_training.text import build_tokenizer, tokenize, train_tokenizer


DRAWINGS = {
    "red-heart": '<circle cx="64" cy="64" r="40" fill="#f44336"/>',
    "blue-book": '<path d="M20 20h88v88H20z" fill="#1565c0"/>',
    "star": '<path d="M64 10l50 100H14z" fill="#fdd835"/>',
    "mango": '<path d="M64 10l50 100H14z" fill="#ff8f00"/>',
    "flag-of-nowhere": '<path d="M0 0h128v128H0z"/>',
}
TAUGHT = ("blue-book", "red-heart", "star")


@pytest.fixture
def archive_dir(tmp_path: Path) -> Path:
    """A folder with small icon archives, in the form `npm pack` leaves."""
    folder = tmp_path / "archives"
    folder.mkdir()
    table = {"width": 128, "height": 128, "icons": {name: {"body": body} for name, body in DRAWINGS.items()}}
    raw = json.dumps(table).encode()
    for package in PACKAGES.values():
        with tarfile.open(folder / f"{package[1:].replace('/', '-')}-1.0.0.tgz", "w:gz") as tar:
            info = tarfile.TarInfo("package/icons.json")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return folder


@pytest.fixture
def icons(archive_dir: Path, tmp_path: Path) -> list[Icon]:
    """What there is to learn in these archives."""
    return gather_icons(FULL.styles, None, HELD_OUT, archive_dir, tmp_path)[0]


def run(archive_dir: Path, tmp_path: Path, *more: str) -> int:
    """The script in toy sizes."""
    common = ["--data-dir", str(archive_dir), "--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "model")]
    return train_emoji.main([*common, "--recipe", "tiny", *more])


def state(tmp_path: Path, stage: str) -> dict:
    """The state a stage's checkpoint holds."""
    return json.loads((tmp_path / "work" / stage / "state.json").read_text())


# Drawings


def test_what_cannot_be_learnt_is_left_out(archive_dir: Path, tmp_path: Path) -> None:
    taught, unseen = gather_icons(FULL.styles, None, HELD_OUT, archive_dir, tmp_path)
    assert [(icon.style, icon.name) for icon in taught] == [(s, name) for s in FULL.styles for name in TAUGHT]
    assert [(icon.style, icon.name) for icon in unseen] == [(style, "mango") for style in FULL.styles]
    left_out = (
        "keycap-5 eleven-thirty eleven-oclock letter-a cool-button man-elf mermaid-tone1 digit-one 5 ok-hand-dark"
    )
    left_out += " woman-walking-facing-right triangular-flag waving-hand-medium-skin-tone input-latin-letters"
    assert not [name for name in left_out.split() if is_taught(name)]
    assert all(is_taught(name) for name in (*NAMES, *HELD_OUT, "mango", "phoenix", "couch-and-lamp"))


def test_sprites_are_rendered_once(icons: list[Icon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_sprites(icons, 24, tmp_path / "sprites.safetensors")
    monkeypatch.setattr("emoji_training.sprites.render", None)
    again = load_sprites(icons, 24, tmp_path / "sprites.safetensors")
    assert torch.equal(first.pictures, again.pictures) and first.pictures.shape == (9, 4, 24, 24)
    with pytest.raises(TypeError):  # others are not taken for these
        load_sprites(icons[1:], 24, tmp_path / "sprites.safetensors")


def test_sprites_are_cut_out_and_smaller_ones_average_them(icons: list[Icon]) -> None:
    heart = torch.from_numpy(render(icons[1], 32))
    assert heart[:, 16, 16].tolist() == [0xF4, 0x43, 0x36, 255] and heart[:, 0, 0].tolist() == [0, 0, 0, 0]
    edge = (heart[3] > 0) & (heart[3] < 255)
    assert edge.any() and (heart[0][edge].int() <= heart[3][edge].int()).all(), "colours are multiplied by alpha"
    small = Sprites(icons, torch.stack([heart])).smaller(2).pictures[0]
    assert (
        small.float() - heart.float().unflatten(2, (2, 16)).unflatten(1, (2, 16)).mean(dim=(2, 4))
    ).abs().max() <= 1


# Scenes


@pytest.mark.parametrize("recipe", [FULL, SMALL, TINY], ids=["full", "small", "tiny"])
def test_scenes_are_as_the_recipe_says(recipe, icons: list[Icon]) -> None:
    scenes = SceneSource([icon for icon in icons if icon.style in recipe.styles], recipe, "a").draw(300)
    assert {len(scene.things) for scene in scenes} == set(range(1, len(recipe.scene_counts) + 1))
    assert {scene.style for scene in scenes} == set(recipe.styles)
    for scene in scenes:
        assert all(icons[thing.row].name == thing.name for thing in scene.things)
        assert all(icons[thing.row].style == scene.style for thing in scene.things)
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            assert all(thing.size / 2 <= place <= 1 - thing.size / 2 for place in (thing.x, thing.y))
        for one, other in itertools.combinations(scene.things, 2):
            apart = math.dist((one.x, one.y), (other.x, other.y))
            assert apart >= 0.45 * (one.size + other.size)
    assert {scene.background.pattern for scene in scenes} <= {"plain", *recipe.backgrounds}
    # so that no two in a batch have to be told apart by nothing
    assert all({scenes[n + k].things[0].name for k in range(3)} == set(TAUGHT) for n in range(0, 300, 3))


def test_scenes_are_the_same_for_a_seed(icons: list[Icon]) -> None:
    first, second, other = (SceneSource(icons, FULL, seed).draw(5) for seed in ("a", "a", "b"))
    assert first == second != other


SQUARE = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)[:, None, None].expand(4, 16, 16)
PLAIN = Background("plain", ("teal",), 0.0, 0.1)


def sprites_of(*pictures: torch.Tensor) -> Sprites:
    """Sprites without a drawing behind them."""
    return Sprites([Icon("noto", str(number), "", 1, 1) for number in range(len(pictures))], torch.stack(pictures))


def test_a_drawing_lies_where_the_scene_says() -> None:
    scene = Scene("noto", (Thing(0, "0", 0.25, 0.5, 0.25, 0.0),), PLAIN)
    picture = to_bytes(compose([scene], sprites_of(SQUARE), 64))[0]
    red, teal = torch.tensor([255, 0, 0]), torch.tensor(PALETTE["teal"])
    assert (red == picture[:, 25:39, 9:23].flatten(1).T).all()
    picture[:, 23:41, 7:25] = teal.to(torch.uint8)[:, None, None]
    assert (teal == picture.flatten(1).T).all()


def test_a_turn_is_clockwise_and_transparent_parts_show_what_is_behind() -> None:
    upper = SQUARE.clone()
    upper[:, 8:] = 0
    scene = Scene("noto", (Thing(0, "0", 0.5, 0.5, 0.5, 90.0),), PLAIN)
    picture = to_bytes(compose([scene], sprites_of(upper), 32))[0]
    assert picture[:, 16, 20].tolist() == [255, 0, 0]  # what was above is on the right
    assert picture[:, 16, 12].tolist() == list(PALETTE["teal"])


def test_later_drawings_cover_earlier_ones_and_scenes_do_not_touch_each_other() -> None:
    blue = SQUARE[[1, 2, 0, 3]]
    both = (Thing(0, "0", 0.5, 0.5, 0.5, 0.0), Thing(1, "1", 0.6, 0.5, 0.5, 0.0))
    scenes = [Scene("noto", both[:1], PLAIN), Scene("noto", both, PLAIN), Scene("noto", both[1:], PLAIN)]
    together = compose(scenes, sprites_of(SQUARE, blue), 32)
    assert to_bytes(together)[:, :, 16, 16].tolist() == [[255, 0, 0], [0, 0, 255], [0, 0, 255]]
    apart = torch.cat([compose([scene], sprites_of(SQUARE, blue), 32) for scene in scenes])
    assert torch.allclose(together, apart, atol=1e-6)


@pytest.mark.parametrize("pattern", ["gradient", "stripes", "dots", "checks"])
def test_patterns_are_of_their_two_colours(pattern: str) -> None:
    scene = Scene("noto", (Thing(0, "0", 0.5, 0.5, 1e-3, 0.0),), Background(pattern, ("black", "white"), 0.0, 0.125))
    grey = compose([scene], sprites_of(SQUARE), 64)[0].mean(dim=0)
    low, high = PALETTE["black"][0] / 127.5 - 1, 1.0
    assert grey.min() < low + 0.05 and grey.max() > high - 0.05
    if pattern == "gradient":
        assert (grey.diff(dim=1)[:, :30] > 0).all() and grey.diff(dim=0).abs().max() < 0.05
    else:  # it repeats after an eighth of the side
        assert torch.allclose(grey[:, :20], grey[:, 8:28], atol=1e-4)


# Words


def test_captions_read_well() -> None:
    def said(*names: str, style: str = "noto", background: Background = PLAIN, styles: int = 3) -> str:
        words = Captions([Icon(each, name, "", 1, 1) for each in FULL.styles[:styles] for name in names])
        return words.plain(Scene(style, tuple(Thing(0, n, 0.5, 0.5, 0.3, 0.0) for n in names), background))

    white = Background("plain", ("white",), 0.0, 0.1)
    assert said("red-apple", "tiger-face") == "a red apple and a tiger face on a teal background, noto style"
    assert said("octopus", "glasses", "rice-ball", style="3d") == (
        "an octopus, glasses and a rice ball on a teal background, 3d style"
    )
    assert said("red-apple", background=white) == "a red apple on a white background, noto style"
    assert said("red-apple", background=white, styles=1) == "a red apple"
    graded = Background("gradient", ("orange", "light blue"), 0.0, 0.1)
    assert said("bus", background=graded, styles=1) == "a bus on a gradient from orange to light blue"
    checks = Background("checks", ("orange", "black"), 0.0, 0.1)
    assert said("french-fries", background=checks, styles=1).endswith("on an orange and black checkered background")
    for phrase in ("a unicorn", "a pair of eyes", "an hourglass done", "an x ray", "a one piece swimsuit", "a bus"):
        assert with_article(phrase.split(" ", 1)[1]) == phrase
    for phrase in ("maracas", "face with rolling eyes", "glasses"):
        assert with_article(phrase) == (f"a {phrase}" if phrase.startswith("face") else phrase)
    assert not (set(PHRASES) | set(SYNONYMS) | set(COLOURS)) - set(NAMES)
    assert len(set(NAMES)) == len(NAMES) and not set(NAMES) & set(HELD_OUT)
    assert len({phrases[0] for phrases in Captions(icons_called(*NAMES)).phrases.values()}) == len(NAMES)


def icons_called(*names: str) -> list[Icon]:
    """Drawings that only have names."""
    return [Icon("noto", name, "", 1, 1) for name in names]


def test_no_word_means_two_drawings() -> None:
    """ "fish" is what the small model calls its tropical fish; where there is a fish, too, that one has the word."""
    alone = Captions(icons_called("tropical-fish", "cat-face")).phrases
    assert alone["tropical-fish"][0] == "fish" and "cat" in alone["cat-face"]
    both = Captions(icons_called("tropical-fish", "fish", "cat-face", "cat")).phrases
    assert both["tropical-fish"][0] == "tropical fish" and "fish" not in both["tropical-fish"]
    assert both["fish"][0] == "fish" and "cat" not in both["cat-face"]


def test_no_more_captions_are_waited_for_than_there_are() -> None:
    few = icons_called("red-apple", "frog", "star")
    scenes = distinct_scenes(SceneSource(few, SMALL, "a"), Captions(few), 128)
    assert set(scenes) == {"a red apple", "a frog face", "a star"}
    assert all(Captions(few).plain(scene) == words for words, scene in scenes.items())
    assert len(distinct_scenes(SceneSource(few, SMALL, "a"), Captions(few), 2)) == 2


def test_places_are_said_as_they_are() -> None:
    rng, heard, words_for = random.Random(0), set(), Captions(icons_called("red-apple", "frog"))
    things = (Thing(0, "red-apple", 0.3, 0.5, 0.3, 0.0), Thing(0, "frog", 0.7, 0.5, 0.3, 0.0))
    turned = tuple(Thing(0, thing.name, thing.y, thing.x, 0.3, 0.0) for thing in things)
    for both in (things, turned):
        for _ in range(200):
            words = words_for.draw(Scene("noto", both, PLAIN), rng)
            assert "apple" in words and "frog" in words
            for relation, right in (
                ("to the left of", both is things and words.index("apple") < words.index("frog")),
                ("to the right of", both is things and words.index("frog") < words.index("apple")),
                ("above", both is turned and words.index("apple") < words.index("frog")),
                ("below", both is turned and words.index("frog") < words.index("apple")),
            ):
                if relation in words:
                    heard.add(relation)
                    assert right, words
    assert len(heard) == 4


def test_what_is_left_unsaid_is_mostly_white_and_noto(icons: list[Icon]) -> None:
    rng, captions = random.Random(0), Captions(icons)
    scenes = SceneSource(icons, FULL, "a").draw(6000)
    bare = [scene for scene in scenes if not re.search("style|, (noto|flat|3d)| on ", captions.draw(scene, rng))]
    assert len(bare) > 100
    plain = [scene for scene in bare if scene.style == "noto" and scene.background.colours == ("white",)]
    assert len(plain) > 0.5 * len(bare)


def test_every_prompt_tokenizes() -> None:
    tokenizer = train_tokenizer(["a red apple", "an emoji of a red apple"], FULL.vocabulary)
    for prompt in ("a red apple", "", "ünïcödé 漢字 🍎", "x" * 300, "a\tb\nc  1234!?"):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids
        assert len(tokens) == 77 and tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
        assert max(tokens) < len(tokenizer)
        inner = tokenizer(prompt).input_ids[1:-1]
        assert tokenizer.unk_token_id not in inner, "no byte is unknown"


# Training


def test_padding_does_not_change_a_text_s_features(icons: list[Icon]) -> None:
    tokenizer = build_tokenizer(icons, TINY)
    model = clip.build_clip(TINY, tokenizer).eval()
    texts = ["a red heart", "a star on a teal background, 3d style", ""]
    with torch.no_grad():
        states = model.text_model(tokenize(tokenizer, texts)).pooler_output
        assert torch.allclose(clip.embed_texts(model, tokenizer, texts), model.text_projection(states), atol=1e-5)


def test_timesteps_cover_the_range_and_later_dwell_on_its_noisy_end(monkeypatch: pytest.MonkeyPatch) -> None:
    early = unet.draw_times(16, 1000, SMALL, fraction=0.0)
    assert all(index * 62.5 - 1 <= time < (index + 1) * 62.5 for index, time in enumerate(sorted(early.tolist())))
    late = unet.draw_times(16, 1000, SMALL, fraction=0.9)
    assert late.min() >= 0
    assert late.max() < 1000
    assert sum(time >= 650 for time in late[4:].tolist()) == 12
    assert late[:4].min() < 250 <= late[:4].max()
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 1 - 2**-24))
    assert unet.draw_times(256, 1000, FULL, fraction=0.0).max() == 999, "rounding does not leave the range"


def test_the_pool_is_renewed_oldest_first(icons: list[Icon], tmp_path: Path) -> None:
    sprites = load_sprites(icons, TINY.sprite_size, tmp_path / "sprites.safetensors")
    pool = unet.LatentPool(sprites, TINY, vae.build_vae(TINY).eval(), build_tokenizer(icons, TINY), seed="a")
    before = pool.latents.clone()
    pool.renew(3)
    changed = (pool.latents != before).flatten(1).any(dim=1)
    assert changed.tolist() == [True] * 3 + [False] * 5
    pool.renew(6)  # over the end
    changed = (pool.latents != before).flatten(1).any(dim=1)
    assert changed.all() and pool.next == 1
    latents, tokens = pool.batch()
    assert latents.shape == (4, 4, 8, 8) and tokens.shape == (4, 77)


def test_whole_chain(archive_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel

    from agentsd.bench.reference import ReferenceSet

    assert run(archive_dir, tmp_path, "--stage", "all") == 0
    assert all(state(tmp_path, stage)["finished"] for stage in ("vae", "clip", "unet"))
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
    encoder = CLIPModel.from_pretrained(model / "clip", use_safetensors=True)
    assert encoder.dtype == torch.float32
    reference = ReferenceSet.load(model / "clip" / "reference.safetensors")
    assert reference.rows.shape == (TINY.reference_rows, TINY.clip_width)


@pytest.mark.parametrize("stage", ["vae", "clip", "unet"])
def test_resume_goes_on_where_a_crash_left_off(
    stage: str, archive_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    monkeypatch.setattr(loop.Progress, "__iter__", lambda progress: itertools.islice(steps(progress), 3))
    assert run(archive_dir, tmp_path, "--stage", stage, "--minutes", "5", "--resume") == 0
    resumed = state(tmp_path, stage)
    assert resumed["step"] == 7 and resumed["elapsed"] > crashed["elapsed"] and resumed["finished"]

    assert run(archive_dir, tmp_path, "--stage", stage, "--resume") == 0
    assert state(tmp_path, stage) == resumed, "a finished stage is left as it is"


def test_the_loss_log_holds_means(capsys: pytest.CaptureFixture[str]) -> None:
    kept = loop.new_state()
    progress = loop.Progress("stage", kept, minutes=1, log_steps=3)
    for number, _ in zip(range(1, 8), progress, strict=False):
        progress.end_step({"loss": torch.tensor(float(number))})
    assert [(row["step"], row["loss"]) for row in kept["log"]] == [(1, 1.0), (3, 2.5), (6, 5.0)]


def test_a_picture_finds_its_own_text() -> None:
    own = torch.eye(8, dtype=torch.float64).numpy()
    assert hit_rates(own, 3 * own) == {"top1": 1.0, "top5": 1.0}
    assert hit_rates(own, np.roll(own, 1, axis=0)) == {"top1": 0.0, "top5": 0.0}
    assert hit_rates(np.ones((8, 2)), np.ones((8, 2)))["top5"] == 0.0, "an encoder that sees nothing"
    pictures = own.copy()
    pictures[0] = [0.5, 1, 1, 1, 1, 0, 0, 0]  # four others are nearer
    pictures[1] = [1, 0.5, 1, 1, 1, 1, 0, 0]  # five others are
    assert hit_rates(pictures, own) == {"top1": 0.75, "top5": 0.875}


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
    pictures = to_float(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        before = model.decode(model.encode(pictures).latent_dist.mean).sample
        vae.standardise_latents(model, pictures)
        latents = model.encode(pictures).latent_dist.mean
        after = model.decode(latents).sample
    assert (before - after).abs().max() <= 1e-2
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.05 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05


# Errors


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
    broken = Icon("noto", "torn", "<path", 1, 1)
    with pytest.raises(DataError, match="'torn' of style 'noto' cannot be rendered"):
        render(broken, 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archives.shutil, "which", lambda name: None)
    assert train_emoji.main(work) == 2
    assert "npm is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "resvg_py"])
def test_a_missing_package_is_explained(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import train_emoji"
    folder = Path(train_emoji.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {package} is not installed: `pip install")


def test_unknown_name_and_missing_stage_are_explained(
    archive_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(archive_dir), "--work-dir", str(tmp_path / "work")]
    assert train_emoji.main([*where, "--names", "red-heart,no-such-thing"]) == 2
    assert "'no-such-thing'" in capsys.readouterr().err
    for stage, needed in (("unet", "--stage vae"), ("clip", "--stage vae"), ("export", "--stage unet")):
        assert train_emoji.main([*where, "--names", "red-heart", "--recipe", "tiny", "--stage", stage]) == 2
        assert needed in capsys.readouterr().err
