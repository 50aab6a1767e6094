"""The patched pipeline: `apply_patch` and loading in one, used like the pipeline itself."""

import copy
import json
import os
import pickle

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from models import tiny_sd, tiny_sdxl
from runs import image

import agentsd
from agentsd.pipeline import AgentSDPipeline


def test_wrapper_draws_what_the_patched_pipeline_draws(model):
    """It is `apply_patch` and nothing else."""
    wrapped = AgentSDPipeline.from_pretrained(model, ratio=0.6, device="cpu", agent_until=0.3)
    by_hand = agentsd.apply_patch(tiny_sd(), ratio=0.6, agent_until=0.3)
    assert torch.equal(image(wrapped), image(by_hand))
    assert not torch.equal(image(wrapped), image(tiny_sd()))


def test_wrapper_takes_a_config_or_keywords(model, model_file):
    """Not both; and diffusers' own `config` of a single file is told from ours by its type."""
    config = agentsd.AgentSDConfig(ratio=0.2)
    assert AgentSDPipeline.from_pretrained(model, config=config).patch_config == config
    assert AgentSDPipeline.from_pretrained(model).patch_config == agentsd.AgentSDConfig()
    assert AgentSDPipeline.from_pretrained(model_file, 0.2, config=model).patch_config == config
    with pytest.raises(ValueError, match="either `config` or ratio"):
        AgentSDPipeline.from_pretrained(model, ratio=0.2, config=config)


def test_wrapper_passes_the_filter_on(model):
    """Layers can be chosen here as in `apply_patch`."""
    pipe = AgentSDPipeline.from_pretrained(model, filter_fn=lambda name, module: name.startswith("up_blocks"))
    assert {row.name.split(".")[0] for row in agentsd.report(pipe).rows} == {"up_blocks"}


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": "half"}, {"agent_until": 2}])
def test_bad_patch_option_is_found_before_the_model_is_loaded(options):
    """Nobody should wait for gigabytes to hear of a typo."""
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        AgentSDPipeline.from_pretrained("/no/such/model", **options)


def test_unknown_patch_option(model):
    """A misspelt field must not be ignored."""
    with pytest.raises(TypeError, match="has no option 'agent_untill'"):
        AgentSDPipeline.from_pretrained(model, agent_untill=0.3)


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
    assert torch.equal(image(agentsd.remove_patch(wrapped)), image(tiny_sd()))


def test_wrapping_keeps_a_patch():
    """What somebody patched by hand stays as it is."""
    assert AgentSDPipeline(agentsd.apply_patch(tiny_sd(), ratio=0.7)).patch_config.ratio == 0.7


def test_a_copy_of_an_unpatched_wrapper_is_not_patched():
    wrapped = agentsd.remove_patch(AgentSDPipeline(tiny_sd()))
    assert copy.copy(wrapped).pipe is wrapped.pipe
    assert not agentsd.is_patched(pickle.loads(pickle.dumps(wrapped)))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_wrapper_can_be_copied(clone):
    """Delegating attributes is a usual way to make copying and unpickling recurse for ever."""
    wrapped = AgentSDPipeline(tiny_sd())
    cloned = clone(wrapped)
    assert type(cloned) is AgentSDPipeline
    assert cloned.unet is not wrapped.unet
    assert torch.equal(image(cloned), image(wrapped))


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (AutoPipelineForImage2Image, "StableDiffusionImg2ImgPipeline"),
        (AutoPipelineForInpainting, "StableDiffusionInpaintPipeline"),
        (AutoPipelineForText2Image, "StableDiffusionPipeline"),
        (StableDiffusionImg2ImgPipeline, "StableDiffusionImg2ImgPipeline"),
    ],
)
def test_other_pipelines_are_made_from_the_wrapper(kind, found):
    """diffusers asks an object for its class; what it makes shares the patched UNet."""
    wrapped = AgentSDPipeline(tiny_sd())
    made = kind.from_pipe(wrapped)
    assert type(made).__name__ == found
    assert made.unet is wrapped.unet and agentsd.is_patched(made)


def test_wrapper_is_an_instance_of_both():
    wrapped = AgentSDPipeline(tiny_sdxl())
    assert isinstance(wrapped, AgentSDPipeline) and isinstance(wrapped, StableDiffusionXLPipeline)
    assert AgentSDPipeline(wrapped).pipe is wrapped.pipe


def test_completion_finds_what_the_pipeline_has():
    """A notebook asks `dir` for it."""
    wrapped = AgentSDPipeline(tiny_sd())
    assert {"unet", "scheduler", "load_lora_weights", "compare", "patch_config", "pipe"} <= set(dir(wrapped))
    assert set(dir(wrapped.pipe)) <= set(dir(wrapped))


def test_sdxl_through_the_wrapper(tmp_path):
    """The class comes from the folder, not from agentsd."""
    tiny_sdxl().save_pretrained(tmp_path)
    pipe = AgentSDPipeline.from_pretrained(os.fspath(tmp_path))
    assert isinstance(pipe.pipe, StableDiffusionXLPipeline)
    assert image(pipe).isfinite().all()


def test_compare(model):
    """The wrapper compares with its own patch, and keeps it."""
    pipe = AgentSDPipeline.from_pretrained(model, ratio=0.2, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    comparison = pipe.compare("a red apple", steps=2, seconds=0)
    assert comparison.settings["patch"]["ratio"] == 0.2
    assert comparison.baseline.size == comparison.agentsd.size == (128, 128)
    assert pipe.patch_config.ratio == 0.2
    json.dumps(comparison.to_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_parts_have_the_precision(model, dtype):
    """A text encoder in another precision than the UNet fails in the middle of a run."""
    pipe = AgentSDPipeline.from_pretrained(model, device="cpu", dtype=dtype)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {getattr(torch, dtype)}
    assert image(pipe).isfinite().all()
