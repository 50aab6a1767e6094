"""Loading and wrapping: models from every place they lie in, on a device that works, no pickles."""

import copy
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from models import tiny_sd, tiny_sdxl
from safetensors.torch import save_file

import agentsd
from agentsd.loading import load_pipeline, pick_device, pick_dtype, resolve_model
from agentsd.pipeline import AgentSDPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as `save_pretrained` leaves it."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_sd().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The same model as one file in the original layout of Stable Diffusion."""
    path = tmp_path_factory.mktemp("file") / "tiny.safetensors"
    save_file(original_layout(tiny_sd()), path)
    return path


def draw(pipe, seed=0):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images[0]


# --- where models lie -------------------------------------------------------------------------------------------


def test_folder_gives_the_model(folder):
    """Loading must not change what the model draws."""
    assert resolve_model(folder) == resolve_model(str(folder)) == folder
    pipe = load_pipeline(str(folder), device="cpu")
    assert isinstance(pipe, StableDiffusionPipeline)
    assert not agentsd.is_patched(pipe)
    np.testing.assert_array_equal(draw(pipe), draw(tiny_sd()))


def test_single_file_gives_the_model(file, folder):
    """A checkpoint in the original layout, described by a local folder: no connection needed, the same picture."""
    pipe = load_pipeline(file, device="cpu", config=str(folder))
    assert isinstance(pipe, StableDiffusionPipeline)
    np.testing.assert_array_equal(draw(pipe), draw(tiny_sd()))


def test_single_file_without_description_needs_the_hub(file):
    """The error must say what is missing and what to give instead."""
    with pytest.raises(OSError, match="give `config`, a folder that has the model's"):
        load_pipeline(file)


@pytest.mark.parametrize(
    ("key", "channels", "expected"),
    [
        ("cond_stage_model.x", 4, "StableDiffusionPipeline"),
        ("cond_stage_model.x", 9, "StableDiffusionInpaintPipeline"),
        ("conditioner.embedders.1.x", 4, "StableDiffusionXLPipeline"),
        ("conditioner.embedders.1.x", 9, "StableDiffusionXLInpaintPipeline"),
        ("conditioner.embedders.0.x", 4, "StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_single_file_is_loaded_by_the_pipeline_it_was_made_for(tmp_path, key, channels, expected):
    """SDXL weights in a Stable Diffusion 1.5 pipeline fail in ways nobody understands."""
    from agentsd.loading import _pipeline_class_of_file

    weights = {key: torch.zeros(1), "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}
    save_file(weights, tmp_path / "model.safetensors")
    assert _pipeline_class_of_file(tmp_path / "model.safetensors", None).__name__ == expected


def test_hub_id_is_told_from_a_path(tmp_path, monkeypatch):
    """`owner/name` is an id unless there is such a folder."""
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/some-model.v2") == "owner/some-model.v2"
    tiny_sd().save_pretrained("owner/some-model.v2")
    assert resolve_model("owner/some-model.v2").is_dir()


def test_hub_that_does_not_answer():
    """A typo in a folder's name looks like an id, so the error must name both possibilities."""
    with pytest.raises(OSError, match="no such folder here, and the Hugging Face Hub did not give it"):
        load_pipeline("no-such-owner/no-such-model")


@pytest.mark.parametrize("model", ["./nothing", "../a/nothing", "/no/such/model", "~/no-such", "nothing", "a/b/c"])
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
    """A picture or a text is not a model."""
    (tmp_path / "model.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"folders and files that end in \.safetensors"):
        resolve_model(tmp_path / "model.txt")


def test_file_that_is_only_a_part(tmp_path):
    """A LoRA or a VAE alone cannot draw."""
    save_file({"lora.down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is not a whole Stable Diffusion model"):
        load_pipeline(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("option", ["rato", "config"])
def test_unknown_option(folder, option):
    """diffusers would ignore a misspelt option; so would a folder given diffusers' `config`, which is for files."""
    with pytest.raises(TypeError, match=f"from a folder has no option '{option}'"):
        load_pipeline(folder, **{option: "0.5"})


@pytest.mark.parametrize("model", ["folder", "file"])
def test_unknown_option_is_found_before_the_model_is_loaded(model, request, folder, monkeypatch):
    """Weights may take minutes to come."""

    def load(*args, **options):
        raise AssertionError("loaded")

    for function in ("from_pretrained", "from_single_file"):
        monkeypatch.setattr(StableDiffusionPipeline, function, load)
        monkeypatch.setattr(DiffusionPipeline, function, load, raising=False)
    options = {"config": folder} if model == "file" else {}
    with pytest.raises(TypeError, match=f"from a {model} has no option 'rato'"):
        load_pipeline(request.getfixturevalue(model), device="cpu", rato=0.5, **options)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_parts_have_the_precision(folder, dtype):
    """A text encoder in another precision than the UNet fails in the middle of a run."""
    pipe = AgentSDPipeline.from_pretrained(folder, device="cpu", dtype=dtype)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {getattr(torch, dtype)}
    assert np.isfinite(draw(pipe)).all()


# --- the patched pipeline ---------------------------------------------------------------------------------------


def test_wrapper_draws_what_the_patched_pipeline_draws(folder):
    """It is `apply_patch` and nothing else."""
    wrapped = AgentSDPipeline.from_pretrained(folder, ratio=0.6, device="cpu", agent_until=0.3)
    by_hand = agentsd.apply_patch(tiny_sd(), ratio=0.6, agent_until=0.3)
    np.testing.assert_array_equal(draw(wrapped), draw(by_hand))
    assert np.any(draw(wrapped) != draw(tiny_sd()))


def test_wrapper_takes_a_config_or_keywords(folder, file):
    """Not both; and diffusers' own `config` of a single file is told from ours by its type."""
    config = agentsd.AgentSDConfig(ratio=0.2)
    assert AgentSDPipeline.from_pretrained(folder, config=config).patch_config == config
    assert AgentSDPipeline.from_pretrained(folder).patch_config == agentsd.AgentSDConfig()
    assert AgentSDPipeline.from_pretrained(file, 0.2, config=str(folder)).patch_config == config
    with pytest.raises(ValueError, match="either `config` or ratio"):
        AgentSDPipeline.from_pretrained(folder, ratio=0.2, config=config)


def test_wrapper_passes_the_filter_on(folder):
    """Layers can be chosen here as in `apply_patch`."""
    pipe = AgentSDPipeline.from_pretrained(folder, filter_fn=lambda name, module: name.startswith("up_blocks"))
    assert {row.name.split(".")[0] for row in agentsd.report(pipe).rows} == {"up_blocks"}


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": "half"}, {"agent_until": 2}])
def test_bad_patch_option_is_found_before_the_model_is_loaded(options):
    """Nobody should wait for gigabytes to hear of a typo."""
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        AgentSDPipeline.from_pretrained("/no/such/model", **options)


def test_unknown_patch_option(folder):
    """A misspelt field must not be ignored."""
    with pytest.raises(TypeError, match="has no option 'agent_untill'"):
        AgentSDPipeline.from_pretrained(folder, agent_untill=0.3)


def test_wrapper_is_used_like_the_pipeline():
    """Reading, setting and moving reach the pipeline: a scheduler set on the wrapper alone would do nothing."""
    pipe = tiny_sd()
    wrapped = AgentSDPipeline(pipe)
    assert wrapped.unet is pipe.unet
    wrapped.scheduler = DPMSolverMultistepScheduler.from_config(wrapped.scheduler.config)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert wrapped.to("cpu") is wrapped
    assert wrapped.config is pipe.config
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wrapped.nonsense
    assert "StableDiffusionPipeline" in repr(wrapped)


def test_the_wrapped_pipeline_cannot_be_replaced():
    """It would become an attribute of the old one, and go unused."""
    pipe = tiny_sd()
    wrapper = AgentSDPipeline(pipe)
    with pytest.raises(AttributeError, match=r"AgentSDPipeline\(other\)"):
        wrapper.pipe = tiny_sd()
    assert wrapper.pipe is pipe
    assert not hasattr(pipe, "pipe")


def test_patch_functions_take_the_wrapper():
    """Removing and changing the patch works on it too."""
    wrapped = AgentSDPipeline(tiny_sd())
    assert agentsd.is_patched(wrapped)
    assert agentsd.apply_patch(wrapped, ratio=0.7).patch_config.ratio == 0.7
    np.testing.assert_array_equal(draw(agentsd.remove_patch(wrapped)), draw(tiny_sd()))


def test_wrapping_keeps_a_patch():
    """What somebody patched by hand stays as it is."""
    assert AgentSDPipeline(agentsd.apply_patch(tiny_sd(), ratio=0.7)).patch_config.ratio == 0.7


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_wrapper_can_be_copied(clone):
    """Delegating attributes is a usual way to make copying and unpickling recurse for ever."""
    wrapped = AgentSDPipeline(tiny_sd())
    cloned = clone(wrapped)
    assert cloned.unet is not wrapped.unet
    np.testing.assert_array_equal(draw(cloned), draw(wrapped))


def test_sdxl_through_the_wrapper(tmp_path):
    """The class comes from the folder, not from agentsd."""
    tiny_sdxl().save_pretrained(tmp_path)
    pipe = AgentSDPipeline.from_pretrained(os.fspath(tmp_path))
    assert isinstance(pipe.pipe, StableDiffusionXLPipeline)
    assert np.isfinite(draw(pipe)).all()


def test_compare(folder):
    """The wrapper compares with its own patch, and keeps it."""
    pipe = AgentSDPipeline.from_pretrained(folder, ratio=0.2, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    comparison = pipe.compare("a red apple", steps=2)
    assert comparison.settings["patch"]["ratio"] == 0.2
    assert comparison.vanilla.size == comparison.agentsd.size == (128, 128)
    assert pipe.patch_config.ratio == 0.2
    json.dumps(comparison.to_dict())


# --- the original layout of Stable Diffusion, for the single file -----------------------------------------------


def original_layout(pipe):
    """The weights of `tiny_sd` under the names that Stable Diffusion's first release gave them."""
    unet = {f"model.diffusion_model.{_unet_name(name)}": value for name, value in pipe.unet.state_dict().items()}
    vae = {f"first_stage_model.{_vae_name(name)}": value for name, value in pipe.vae.state_dict().items()}
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in pipe.text_encoder.state_dict().items()
    }
    return {name: value.contiguous() for name, value in {**unet, **vae, **text}.items()}


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_PARTS = {
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def _unet_name(name):
    """For one layer a block: input block 2b+1 is the layer of block b and 2b+2 its down-sampling."""
    for new, old in _UNET_ENDS.items():
        name = re.sub(rf"^{new}\b", old, name)
    name = re.sub(r"(?<=resnets\.\d\.)\w+", lambda found: _UNET_RESNET[found[0]], name)

    def place(found):
        side, block, kind, layer = found[1], int(found[2] or 0), found[3], int(found[4])
        is_attention = int(kind == "attentions")
        if side == "mid_block":
            return f"middle_block.{1 if is_attention else 2 * layer}"
        if kind == "downsamplers":
            return f"input_blocks.{2 * block + 2}.0"
        if kind == "upsamplers":  # after the attention, if the block has one
            return f"output_blocks.{2 * block + 1}.{1 if block == 0 else 2}"
        first = f"input_blocks.{2 * block + 1}" if side == "down_blocks" else f"output_blocks.{2 * block + layer}"
        return f"{first}.{is_attention}"

    kinds = "resnets|attentions|downsamplers|upsamplers"
    name = re.sub(rf"^(down_blocks|mid_block|up_blocks)(?:\.(\d))?\.({kinds})\.(\d)", place, name)
    return re.sub(r"^(input_blocks\.\d\.0)\.conv\b", r"\1.op", name)


def _vae_name(name):
    """For four blocks: the original counts the decoder's from the other end."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"up.{3 - int(found[1])}.block.{found[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for new, old in _VAE_PARTS.items():
        name = name.replace(new, old)
    return name
