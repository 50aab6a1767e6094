"""Copies of a patched model, saved, pickled, deep-copied or shared between pipelines."""

import copy
import io
import pickle

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from models import tiny_sd, tiny_unet

import agentsd
from agentsd import AgentSDConfig

from .support import assert_differs, assert_no_trace, fingerprint, generate, predict_both


EVERYTHING = AgentSDConfig(merge_mlp=True, merge_crossattn=True)


def through_pickle(unet):
    return pickle.loads(pickle.dumps(unet))


def through_torch_save(unet):
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch_save": through_torch_save}


def hook_owners(unet):
    """The objects behind all hooks, and behind all patched layers."""
    owners = set()
    for module in unet.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        owners |= {id(hook.__self__) for hook in hooks}
        owners |= {id(value) for key, value in vars(module).items() if "agentsd" in key}
    return owners


@pytest.mark.parametrize("has_run", [False, True], ids=["fresh", "after_a_run"])
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_share_nothing(make_copy, has_run):
    """`deepcopy`, pickle and `torch.save` of a patched model: patched too, and each is removed on its own."""
    plain = predict_both(tiny_unet())
    unet = agentsd.apply_patch(tiny_unet(), config=EVERYTHING)
    if has_run:
        predict_both(unet)
    twin = make_copy(unet)
    patched = predict_both(unet)
    assert agentsd.is_patched(twin)
    assert torch.equal(predict_both(twin), patched)
    assert_differs(patched, plain)
    assert not hook_owners(unet) & hook_owners(twin)

    agentsd.remove_patch(twin)
    assert_no_trace(twin)
    assert torch.equal(predict_both(twin), plain)
    assert torch.equal(predict_both(unet), patched)
    agentsd.apply_patch(twin, ratio=0.7)
    assert torch.equal(predict_both(unet), patched)
    agentsd.remove_patch(unet)
    assert_no_trace(unet)
    assert torch.equal(predict_both(unet), plain)
    assert_differs(predict_both(twin), plain)


def test_deepcopy_of_a_pipeline():
    """`deepcopy` of a patched pipeline gives a patched pipeline of its own."""
    pipe = agentsd.apply_patch(tiny_sd())
    twin = copy.deepcopy(pipe)
    patched = generate(pipe)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(twin), patched)
    assert torch.equal(generate(pipe), generate(tiny_sd()))


def test_state_dict():
    """`state_dict` of a patched model has the keys and values of the plain one, and goes both ways."""
    plain, unet = tiny_unet(), agentsd.apply_patch(tiny_unet(seed=1), config=EVERYTHING)
    assert list(unet.state_dict()) == list(plain.state_dict())
    unet.load_state_dict(plain.state_dict())
    assert_differs(predict_both(unet), predict_both(plain))
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), predict_both(plain))
    assert len(list(unet.named_parameters())) == len(list(plain.named_parameters()))


def test_save_pretrained(tmp_path):
    """`save_pretrained` of a patched model writes the plain model, which loads unpatched."""
    unet = agentsd.apply_patch(tiny_unet(), config=EVERYTHING)
    predict_both(unet)
    unet.save_pretrained(tmp_path / "patched")
    tiny_unet().save_pretrained(tmp_path / "plain")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "patched")
    assert not agentsd.is_patched(loaded)
    assert torch.equal(predict_both(loaded), predict_both(tiny_unet()))


def test_save_pretrained_pipeline(tmp_path):
    """`save_pretrained` of a patched pipeline: loaded again it is the plain one."""
    pipe = agentsd.apply_patch(tiny_sd(), config=EVERYTHING)
    patched = generate(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert not agentsd.is_patched(loaded)
    assert torch.equal(generate(loaded), generate(tiny_sd()))
    assert torch.equal(generate(agentsd.apply_patch(loaded, config=EVERYTHING)), patched)


def test_from_pipe_shares_the_patch():
    """`from_pipe`: the patch lives on the UNet, so that every pipeline around it sees it, and any can remove it."""
    pipe = agentsd.apply_patch(tiny_sd())
    patched = generate(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    automatic = AutoPipelineForImage2Image.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert agentsd.is_patched(other)
    assert agentsd.is_patched(automatic)
    agentsd.apply_patch(other)
    assert torch.equal(generate(pipe), patched)
    agentsd.remove_patch(other)
    assert not agentsd.is_patched(pipe)
    assert torch.equal(generate(pipe), generate(tiny_sd()))
    assert_no_trace(pipe.unet)
    assert fingerprint(pipe.unet) == fingerprint(tiny_sd().unet)


def test_components_in_a_new_pipeline():
    """A new pipeline from the components of a patched one is patched."""
    pipe = agentsd.apply_patch(tiny_sd())
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate(other), generate(pipe))
    agentsd.remove_patch(pipe)
    assert not agentsd.is_patched(other)
