"""Gradients through a patched model, with and without checkpointing, and training a LoRA through the patch."""

import pytest
import torch
from models import tiny_unet
from peft import LoraConfig

import agentsd
from agentsd import AgentSDConfig
from agentsd.ops.partitioning import _cached_cell_grid

from .support import PHASES, assert_no_trace, in_both_phases, predict, predict_both


EVERYTHING = {
    name: AgentSDConfig(agent_until=config.agent_until, merge_mlp=True, merge_crossattn=True)
    for name, config in PHASES.items()
}
merging_everything = pytest.mark.parametrize("config", EVERYTHING.values(), ids=EVERYTHING)


def gradients(unet, timesteps=(500,), at_once=True):
    """Gradients of all parameters, for calls at several timesteps with one backward pass after all or after each."""
    unet.zero_grad()
    losses = []
    for timestep in timesteps:
        loss = predict(unet, timestep).square().mean()
        if at_once:
            losses.append(loss)
        else:
            loss.backward()
    if at_once:
        sum(losses).backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def assert_same_gradients(ones, others):
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        torch.testing.assert_close(one, others[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@merging_everything
def test_gradients_reach_every_parameter(config):
    """Gradients: those of a patched model are finite and reach every parameter that they reach in a plain one."""
    unet = tiny_unet()
    plain = gradients(unet)
    agentsd.apply_patch(unet, config=config)
    patched = gradients(unet)
    assert patched.keys() == plain.keys()
    assert all(torch.isfinite(gradient).all() for gradient in patched.values())
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert patched[name].abs().max() > 0
    assert not torch.equal(patched[name], plain[name])
    agentsd.remove_patch(unet)
    assert_same_gradients(gradients(unet), plain)


@in_both_phases
def test_gradients_are_those_of_the_patched_function(config):
    """Gradients agree with finite differences (in float64) along a random direction of the patched weights."""
    unet = agentsd.apply_patch(tiny_unet().double(), config=config)
    names = [name for name, _ in unet.named_parameters() if ".attn1.to_v." in name]
    parameters = [unet.get_parameter(name) for name in names]
    found = gradients(unet)
    noise = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=noise, dtype=p.dtype) for p in parameters]
    expected = sum((found[name] * d).sum() for name, d in zip(names, direction, strict=True))

    def loss(step):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=step)
            return predict(unet, 500).square().mean()

    step = 1e-6
    slope = (loss(step) - loss(-2 * step)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-8)


@merging_everything
def test_gradient_checkpointing(config):
    """Gradient checkpointing: the block computed anew in the backward pass merges as it did the first time."""
    unet = agentsd.apply_patch(tiny_unet(), config=config).train()
    expected = gradients(unet)
    unet.enable_gradient_checkpointing()
    assert_same_gradients(gradients(unet), expected)
    agentsd.remove_patch(unet)
    checkpointed = gradients(unet)
    unet.disable_gradient_checkpointing()
    assert_same_gradients(gradients(unet), checkpointed)


def test_gradient_checkpointing_holds_nothing_afterwards():
    """Gradient checkpointing stops in the middle of each block it computes anew: no activations are left there."""
    unet = agentsd.apply_patch(tiny_unet(), merge_mlp=True, merge_crossattn=True).train()
    unet.enable_gradient_checkpointing()
    gradients(unet)
    states = [module.agentsd_layer for module in unet.modules() if hasattr(module, "agentsd_layer")]
    assert states
    assert all(state.call.metric is None and state.call.parts is None for state in states)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("merging", [False, True], ids=["attention", "everything"])
def test_gradient_checkpointing_over_several_timesteps(merging, blocks):
    """
    Gradient checkpointing: one backward pass after calls in both phases; each is computed anew as it was. SDXL has
    several blocks in a transformer.
    """
    unet = tiny_unet(transformer_layers_per_block=blocks)
    agentsd.apply_patch(unet, merge_mlp=merging, merge_crossattn=merging).train()
    expected = gradients(unet, (900, 100, 880))
    unet.enable_gradient_checkpointing()
    assert_same_gradients(gradients(unet, (900, 100, 880)), expected)


def test_gradient_checkpointing_with_a_timestep_per_sample():
    """Gradient checkpointing with samples of both phases in one batch, as in training."""
    unet = agentsd.apply_patch(tiny_unet(), merge_mlp=True).train()
    timesteps = (torch.tensor([900, 100]),)
    expected = gradients(unet, timesteps)
    unet.enable_gradient_checkpointing()
    assert_same_gradients(gradients(unet, timesteps), expected)


def test_a_timestep_per_sample_is_each_sample_alone():
    """Training: samples at different timesteps, in different phases, come out as each would alone."""
    unet = agentsd.apply_patch(tiny_unet(), merge_mlp=True, merge_crossattn=True)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        samples, text = torch.randn(3, 4, 16, 16, generator=noise), torch.randn(3, 7, 32, generator=noise)
        timesteps = torch.tensor([900, 100, 700])
        together = unet(samples, timesteps, encoder_hidden_states=text).sample
        alone = [
            unet(samples[i : i + 1], timesteps[i], encoder_hidden_states=text[i : i + 1]).sample for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_lora_training_through_the_patch(checkpointing):
    """LoRA training: an adapter trained through the patch learns, and the patch comes off afterwards."""
    unet = agentsd.apply_patch(tiny_unet())
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    trainable = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    target, losses = torch.zeros(2, 4, 16, 16), []
    for _ in range(6):
        loss = torch.nn.functional.mse_loss(predict(unet, torch.tensor([900, 100])), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert sum(p.grad.abs().sum().item() for p in trainable) > 0

    unet.eval()
    patched = predict_both(unet)
    agentsd.remove_patch(unet)
    assert_no_trace(unet)
    assert not torch.equal(predict_both(unet), patched)
    unet.delete_adapters("default")
    assert torch.equal(predict_both(unet), predict_both(tiny_unet()))


def test_inference_mode_then_training():
    """A step under `torch.inference_mode` leaves nothing that a later training step trips over."""
    unet = agentsd.apply_patch(tiny_unet())
    fresh = gradients(agentsd.apply_patch(tiny_unet()))
    _cached_cell_grid.cache_clear()
    with torch.inference_mode():
        predict(unet, 500)
    assert_same_gradients(gradients(unet), fresh)
