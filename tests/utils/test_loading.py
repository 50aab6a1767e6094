"""Loading: models from every place they lie in, on a device that works, no pickles."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from models import tiny_sd
from runs import image
from safetensors.torch import save_file

import agentsd
from agentsd.pipeline import AgentSDPipeline
from agentsd.utils.loading import load_pipeline, pick_device, pick_dtype, resolve_model


@pytest.fixture
def folder(model):
    return Path(model)


# --- where models lie -------------------------------------------------------------------------------------------


def test_folder_gives_the_model(folder):
    """Loading must not change what the model draws."""
    assert resolve_model(folder) == resolve_model(str(folder)) == folder
    pipe = load_pipeline(str(folder), device="cpu")
    assert isinstance(pipe, StableDiffusionPipeline)
    assert not agentsd.is_patched(pipe)
    assert torch.equal(image(pipe), image(tiny_sd()))


def test_single_file_gives_the_model(model_file, folder):
    """A checkpoint in the original layout, described by a local folder: no connection needed, the same image."""
    pipe = load_pipeline(model_file, device="cpu", config=str(folder))
    assert isinstance(pipe, StableDiffusionPipeline)
    assert torch.equal(image(pipe), image(tiny_sd()))


def test_single_file_without_description_needs_the_hub(model_file):
    """The error must say what is missing and what to give instead."""
    with pytest.raises(OSError, match=r"give `config`, a folder that has the model's model_index\.json"):
        load_pipeline(model_file)


@pytest.mark.parametrize(
    ("key", "channels", "expected"),
    [
        ("cond_stage_model.x", 4, "StableDiffusionPipeline"),
        ("cond_stage_model.x", 9, "StableDiffusionInpaintPipeline"),
        ("cond_stage_model.x", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("cond_stage_model.x", 7, "StableDiffusionUpscalePipeline"),
        ("conditioner.embedders.1.x", 4, "StableDiffusionXLPipeline"),
        ("conditioner.embedders.1.x", 8, "StableDiffusionXLInstructPix2PixPipeline"),
        ("conditioner.embedders.1.x", 9, "StableDiffusionXLInpaintPipeline"),
        ("conditioner.embedders.0.x", 4, "StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_single_file_is_loaded_by_the_pipeline_it_was_made_for(tmp_path, key, channels, expected):
    """SDXL weights in a Stable Diffusion 1.5 pipeline fail in ways nobody understands."""
    from agentsd.utils.loading import _pipeline_class_of_file

    weights = {key: torch.zeros(1), "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}
    save_file(weights, tmp_path / "model.safetensors")
    assert _pipeline_class_of_file(tmp_path / "model.safetensors", None).__name__ == expected


def test_single_file_that_no_pipeline_loads(tmp_path):
    """Such as a depth model: as text to image it would fail in its first convolution."""
    weights = {
        "cond_stage_model.x": torch.zeros(1),
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 5, 3, 3),
    }
    save_file(weights, tmp_path / "depth.safetensors")
    with pytest.raises(ValueError, match=r"depth\.safetensors has a UNet with 5 input channels"):
        load_pipeline(tmp_path / "depth.safetensors", device="cpu")


def test_description_of_a_pipeline_that_there_is_not(model_file, tmp_path):
    """diffusers would say that a module has no such attribute."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableMagicPipeline"}')
    with pytest.raises(ValueError, match="describes a StableMagicPipeline, which diffusers does not have"):
        load_pipeline(model_file, device="cpu", config=tmp_path)


def test_hub_id_is_told_from_a_path(tmp_path, monkeypatch):
    """`owner/name` is an id unless there is such a folder."""
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/some-model.v2") == "owner/some-model.v2"
    tiny_sd().save_pretrained("owner/some-model.v2")
    assert resolve_model("owner/some-model.v2").is_dir()


def test_hub_that_does_not_answer():
    """A typo in a folder's name looks like an id, so the error must name both possibilities."""
    with pytest.raises(OSError, match="no such folder here, and the Hugging Face Hub did not provide it"):
        load_pipeline("no-such-owner/no-such-model")


def test_hub_id_that_is_in_the_cache(folder, tmp_path):
    """As it is after a first download; without a connection, too."""
    cached = tmp_path / "models--owner--tiny"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    pipe = load_pipeline("owner/tiny", device="cpu", cache_dir=tmp_path)
    assert torch.equal(image(pipe), image(tiny_sd()))


@pytest.mark.parametrize("model", ["./nothing", "../a/nothing", "/no/such/model", "~/no-such", "nothing", "a/b/c", ""])
def test_path_that_does_not_exist(model, tmp_path, monkeypatch):
    """What can only be a path is never looked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(f"There is no model {model!r}")):
        resolve_model(model)


def test_safetensors_file_that_does_not_exist():
    """`owner/name.safetensors` is a path too."""
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve_model("models/missing.safetensors")


def test_model_of_another_type():
    """A pipeline given by mistake must not be formatted into a path."""
    with pytest.raises(TypeError, match="must be a name or a path, but got StableDiffusionPipeline"):
        resolve_model(tiny_sd())


# --- nothing that can run code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".CKPT"])
def test_pickle_file_is_refused(tmp_path, suffix):
    """A pickle runs code when it is loaded; it is refused by its name, before anything opens it."""
    path = tmp_path / f"model{suffix}"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"pickle checkpoint.*Only safetensors are loaded"):
        load_pipeline(path)


def test_pickle_with_the_wrong_name_is_refused(tmp_path):
    """Renaming a pickle must not get it loaded."""
    path = tmp_path / "model.safetensors"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a safetensors file, or is damaged"):
        load_pipeline(path)


def test_folder_with_a_pickle_is_refused(folder, tmp_path):
    """diffusers falls back to .bin files; agentsd does not."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, copied / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="has its unet as a pickle"):
        load_pipeline(copied)


def test_a_pickle_that_is_not_loaded_is_no_obstacle(folder, tmp_path):
    """Such as the safety checker of Stable Diffusion 1.5, when it is left out."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    unet = tiny_sd().unet
    file.unlink()
    torch.save({}, file.with_suffix(".bin"))
    assert load_pipeline(copied, unet=unet).unet is unet


@pytest.mark.parametrize(("text", "message"), [("{oops", "cannot be read"), ("[]", "does not describe a pipeline")])
def test_a_damaged_description_is_named(tmp_path, text, message):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=rf"model_index\.json {message}"):
        load_pipeline(tmp_path)


def test_a_path_is_never_the_built_in_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        resolve_model(Path("emoji"))


def test_asking_for_pickles_is_refused(folder):
    """`use_safetensors=False` is the usual way round."""
    with pytest.raises(ValueError, match="`use_safetensors=False` would load a pickle"):
        load_pipeline(folder, use_safetensors=False)
    load_pipeline(folder, use_safetensors=True)


# --- other things that are no model -----------------------------------------------------------------------------


def test_folder_that_is_no_model(tmp_path):
    """Naming the folder above the model is a usual mistake."""
    with pytest.raises(ValueError, match=r"because it has no model_index\.json"):
        resolve_model(tmp_path)


def test_folder_without_weights(folder, tmp_path):
    """An incomplete download."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="Cannot load the model in"):
        load_pipeline(copied)


def test_file_of_another_kind(tmp_path):
    """An image or a text is not a model."""
    (tmp_path / "model.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"folders and files that end in \.safetensors"):
        resolve_model(tmp_path / "model.txt")


def test_file_that_is_only_a_part(tmp_path):
    """A LoRA or a VAE alone cannot draw."""
    save_file({"lora.down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is not a complete Stable Diffusion model"):
        load_pipeline(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("option", ["rato", "config"])
def test_unknown_option(folder, option):
    """diffusers would ignore a misspelt option; so would a folder given diffusers' `config`, which is for files."""
    with pytest.raises(TypeError, match=f"from a folder has no option '{option}'"):
        load_pipeline(folder, **{option: "0.5"})


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_unknown_option_is_found_before_the_model_is_loaded(kind, folder, model_file, monkeypatch):
    """Weights may take minutes to come."""

    def load(*args, **options):
        raise AssertionError("loaded")

    for function in ("from_pretrained", "from_single_file"):
        monkeypatch.setattr(StableDiffusionPipeline, function, load)
        monkeypatch.setattr(DiffusionPipeline, function, load, raising=False)
    source, options = (model_file, {"config": folder}) if kind == "file" else (folder, {})
    with pytest.raises(TypeError, match=f"from a {kind} has no option 'rato'"):
        load_pipeline(source, device="cpu", rato=0.5, **options)


def test_dtype_by_its_name_in_diffusers(folder):
    assert load_pipeline(folder, device="cpu", torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert AgentSDPipeline.from_pretrained(folder, device="cpu", torch_dtype="bf16").unet.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="either `dtype` or `torch_dtype`"):
        load_pipeline(folder, device="cpu", dtype="float32", torch_dtype=torch.bfloat16)


def test_options_reach_diffusers(folder):
    """Components and their settings can be replaced while loading."""
    scheduler = DPMSolverMultistepScheduler(steps_offset=1)
    assert load_pipeline(folder, scheduler=scheduler).scheduler is scheduler


# --- device and precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "xyz:0", "", 3.5])
def test_device_that_cannot_be_used(device):
    """Found out before the model is loaded, with the devices that there are."""
    with pytest.raises(ValueError, match=r"Cannot use device .* Devices that work here: cpu"):
        pick_device(device)


def test_default_device_is_the_fastest():
    """A GPU is used without asking."""
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device().type == expected


@pytest.mark.parametrize("dtype", ["fp16", "float16", "torch.float16", torch.float16])
def test_names_of_a_precision(dtype):
    """As torch prints it, and as people say it."""
    assert pick_dtype(dtype) == torch.float16


@pytest.mark.parametrize("dtype", ["int8", "half", torch.float64, torch.int32, 16, ""])
def test_precision_that_cannot_be_used(dtype):
    """diffusers would take float32 instead, with a log line."""
    with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
        pick_dtype(dtype)


def test_a_model_that_is_spread_over_devices_stays_there(model, monkeypatch):
    """Moving it to one would undo what was asked for."""
    spread = SimpleNamespace()
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **options: spread)
    assert load_pipeline(model, device="cpu", device_map="balanced") is spread
