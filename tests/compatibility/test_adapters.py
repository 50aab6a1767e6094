"""LoRA and IP-Adapter, loaded before and after patching, fused, switched and unloaded."""

import pytest
import torch
from compat_models import half_mask, ip_adapter_embeds, ip_adapter_state_dict, save_lora
from diffusers.image_processor import IPAdapterMaskProcessor
from models import tiny_sd

import agentsd
from agentsd import AgentSDConfig

from .support import AGENT, TOME, assert_differs, assert_no_trace, check_cycle, fingerprint, generate, in_both_phases


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return save_lora(tmp_path_factory.mktemp("lora"))


def with_ip_adapter(pipe):
    pipe.load_ip_adapter(ip_adapter_state_dict(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    return pipe


def generate_with_image(pipe, **options):
    return generate(pipe, ip_adapter_image_embeds=ip_adapter_embeds(), **options)


@in_both_phases
def test_lora_loaded_before_patching(lora, config):
    """PEFT LoRA: a model with a LoRA loaded is patched and unpatched."""
    pipe = tiny_sd()
    plain = generate(pipe)
    pipe.load_lora_weights(lora)
    assert_differs(generate(pipe), plain)
    check_cycle(pipe, lambda: generate(pipe), config=config)


@in_both_phases
def test_lora_loaded_and_unloaded_while_patched(lora, config):
    """PEFT LoRA: loaded into a patched model it acts as in one patched afterwards; unloading undoes it."""
    other = tiny_sd()
    other.load_lora_weights(lora)
    baseline = generate(other)
    expected = generate(agentsd.apply_patch(other, config=config))

    pipe = agentsd.apply_patch(tiny_sd(), config=config)
    without = generate(pipe)
    pipe.load_lora_weights(lora)
    assert torch.equal(generate(pipe), expected)
    assert_differs(expected, without)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), baseline)
    agentsd.apply_patch(pipe, config=config)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), without)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), generate(tiny_sd()))
    assert fingerprint(pipe.unet) == fingerprint(tiny_sd().unet)


def test_lora_fused_and_unfused_while_patched(lora):
    """PEFT LoRA: fused and unfused in a patched model."""
    reference = tiny_sd()
    reference.load_lora_weights(lora)
    reference.fuse_lora()
    fused = generate(reference)
    reference.unfuse_lora()
    unfused = generate(reference)

    pipe = agentsd.apply_patch(tiny_sd())
    pipe.load_lora_weights(lora)
    loaded = generate(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(generate(pipe), loaded, rtol=1e-3, atol=1e-3)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), fused)
    agentsd.apply_patch(pipe)
    assert_differs(generate(pipe), fused)
    pipe.unfuse_lora()
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), unfused)
    assert_no_trace(pipe.unet)


def test_lora_scaled_and_switched_off_while_patched(lora):
    """PEFT LoRA: its weight, by call and by `set_adapters`, acts in patched layers."""
    pipe = agentsd.apply_patch(tiny_sd())
    without = generate(pipe)
    pipe.load_lora_weights(lora, adapter_name="style")
    full = generate(pipe)
    half = generate(pipe, cross_attention_kwargs={"scale": 0.5})
    assert_differs(half, full)
    pipe.set_adapters("style", adapter_weights=0.5)
    torch.testing.assert_close(generate(pipe), half, rtol=1e-4, atol=1e-4)
    pipe.disable_lora()
    torch.testing.assert_close(generate(pipe), without, rtol=1e-4, atol=1e-4)


@in_both_phases
def test_ip_adapter_loaded_before_patching(config):
    """IP-Adapter: a model with an IP-Adapter loaded is patched, unpatched, and the adapter unloaded."""
    pipe = with_ip_adapter(tiny_sd())
    check_cycle(pipe, lambda: generate_with_image(pipe), config=config)
    agentsd.apply_patch(pipe, config=config)
    pipe.unload_ip_adapter()
    assert torch.equal(generate(pipe), generate(agentsd.apply_patch(tiny_sd(), config=config)))
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), generate(tiny_sd()))
    assert_no_trace(pipe.unet)


@in_both_phases
def test_ip_adapter_loaded_after_patching(config):
    """IP-Adapter: loaded into a patched model, which makes every processor anew without arguments."""
    baseline = with_ip_adapter(tiny_sd())
    expected = generate_with_image(baseline)
    patched = generate_with_image(agentsd.apply_patch(baseline, config=config))

    pipe = agentsd.apply_patch(tiny_sd(), config=config)
    without = generate(pipe)
    with_ip_adapter(pipe)
    assert torch.equal(generate_with_image(pipe), patched)
    assert_differs(patched, expected)
    assert_differs(patched, without)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate_with_image(pipe), expected)
    assert_no_trace(pipe.unet)


@in_both_phases
def test_ip_adapter_loaded_and_unloaded_while_patched(config):
    """IP-Adapter: loading and unloading leaves a patched model as it was, still patched."""
    pipe = agentsd.apply_patch(tiny_sd(), config=config)
    before, found = generate(pipe), fingerprint(pipe.unet)
    with_ip_adapter(pipe)
    pipe.unload_ip_adapter()
    assert torch.equal(generate(pipe), before)
    assert fingerprint(pipe.unet) == found
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), generate(tiny_sd()))
    assert fingerprint(pipe.unet) == fingerprint(tiny_sd().unet)


@pytest.mark.parametrize("agent_until", [1.0, 0.0], ids=["agent", "tome"])
def test_ip_adapter_with_merged_cross_attention_and_mlp(agent_until):
    """IP-Adapter: `merge_crossattn` and `merge_mlp` merge the queries that read the image, too."""
    pipe = with_ip_adapter(tiny_sd())
    config = AgentSDConfig(agent_until=agent_until, merge_crossattn=True, merge_mlp=True)
    merged = check_cycle(pipe, lambda: generate_with_image(pipe), config=config)
    agentsd.apply_patch(pipe, config=config)
    pipe.set_ip_adapter_scale(0.0)
    assert_differs(generate_with_image(pipe), merged)
    assert_differs(merged, generate_with_image(agentsd.apply_patch(pipe, config=AGENT if agent_until else TOME)))


def masks():
    return [IPAdapterMaskProcessor().preprocess([half_mask()], height=128, width=128)]


@in_both_phases
def test_ip_adapter_masks(config):
    """IP-Adapter: masks work while patched."""
    pipe = with_ip_adapter(tiny_sd())
    run = lambda: generate_with_image(pipe, cross_attention_kwargs={"ip_adapter_masks": masks()})  # noqa: E731
    masked = check_cycle(pipe, run, config=config)
    assert_differs(masked, generate_with_image(agentsd.apply_patch(pipe, config=config)))


@pytest.mark.parametrize("agent_until", [1.0, 0.0], ids=["agent", "tome"])
def test_ip_adapter_masks_with_merged_cross_attention_are_refused(agent_until):
    """IP-Adapter: masks lie over unmerged tokens, so that `merge_crossattn` says so instead of painting wrongly."""
    pipe = with_ip_adapter(tiny_sd())
    before = generate_with_image(pipe)
    agentsd.apply_patch(pipe, agent_until=agent_until, merge_crossattn=True)
    with pytest.raises(ValueError, match="merge_crossattn"):
        generate_with_image(pipe, cross_attention_kwargs={"ip_adapter_masks": masks()})
    agentsd.remove_patch(pipe)
    assert torch.equal(generate_with_image(pipe), before)


def test_ip_adapter_masks_where_nothing_is_merged():
    """IP-Adapter: masks are no obstacle to `merge_crossattn` at `ratio=0`, which changes nothing."""
    pipe = with_ip_adapter(tiny_sd())
    options = {"cross_attention_kwargs": {"ip_adapter_masks": masks()}}
    before = generate_with_image(pipe, **options)
    agentsd.apply_patch(pipe, ratio=0, merge_crossattn=True)
    assert torch.equal(generate_with_image(pipe, **options), before)
