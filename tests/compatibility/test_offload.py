"""Offloading and casting: weights that are elsewhere, or of another dtype, until a layer's own forward runs."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from compat_models import save_lora
from diffusers.hooks import HookRegistry, apply_group_offloading
from models import tiny_sd, tiny_unet

import agentsd
from agentsd import AgentSDConfig

from .support import (
    assert_differs,
    assert_no_trace,
    check_cycle,
    fingerprint,
    generate,
    in_both_phases,
    predict_both,
)


CPU = torch.device("cpu")
EVERYTHING = AgentSDConfig(merge_mlp=True, merge_crossattn=True)


def model_offload(unet):
    cpu_offload_with_hook(unet, execution_device=CPU)


def sequential_offload(unet):
    cpu_offload(unet, execution_device=CPU)
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}


def group_offload(unet, **options):
    if diffusers.__version__.startswith("0.40.") and not torch.cuda.is_available():
        pytest.skip("diffusers 0.40 offloads in groups only where there is a GPU")
    apply_group_offloading(unet, CPU, CPU, **options)


def group_offload_blocks(unet):
    group_offload(unet, offload_type="block_level", num_blocks_per_group=1)


def group_offload_leaves(unet):
    group_offload(unet, offload_type="leaf_level")


def group_offload_disk(unet, folder):
    group_offload(unet, offload_type="leaf_level", offload_to_disk_path=str(folder))


def layerwise_casting(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn


OFFLOADS = {
    "model": model_offload,
    "sequential": sequential_offload,
    "group_blocks": group_offload_blocks,
    "group_leaves": group_offload_leaves,
    "layerwise_casting": layerwise_casting,
}


@pytest.mark.parametrize("order", ["offload_first", "patch_first"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_and_casting(offload, order):
    """Model, sequential and group offload, and layerwise casting: put in before patching and after, in both phases."""
    run = lambda unet: predict_both(unet, dtype=torch.float32)  # noqa: E731
    baseline, unet = tiny_unet(), tiny_unet()
    agentsd.apply_patch(baseline, config=EVERYTHING)
    resident = run(baseline)
    agentsd.remove_patch(baseline)
    OFFLOADS[offload](baseline)
    expected, found = run(baseline), fingerprint(baseline)

    if order == "patch_first":
        agentsd.apply_patch(unet, config=EVERYTHING)
        OFFLOADS[offload](unet)
    else:
        OFFLOADS[offload](unet)
        agentsd.apply_patch(unet, config=EVERYTHING)
    patched = run(unet)
    assert_differs(patched, expected)
    if offload != "layerwise_casting":
        # Only where the weights are has changed, not what they are.
        assert torch.equal(patched, resident)
    agentsd.remove_patch(unet)
    assert torch.equal(run(unet), expected)
    assert fingerprint(unet) == found
    assert_no_trace(unet)


def test_group_offload_to_disk(tmp_path):
    """Group offload to disk: the weights are in files between the calls."""
    unet = agentsd.apply_patch(tiny_unet())
    patched = predict_both(unet)
    agentsd.remove_patch(unet)
    group_offload_disk(unet, tmp_path)
    plain = predict_both(unet)
    agentsd.apply_patch(unet)
    assert torch.equal(predict_both(unet), patched)
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), plain)


@in_both_phases
def test_offload_undone_while_patched(config):
    """Offload hooks that come and go around a patch leave the patch alone."""
    unet = agentsd.apply_patch(tiny_unet(), config=config)
    patched = predict_both(unet)
    cpu_offload(unet, execution_device=CPU)
    remove_hook_from_module(unet, recurse=True)
    assert torch.equal(predict_both(unet), patched)
    agentsd.remove_patch(unet)
    group_offload_leaves(unet)
    agentsd.apply_patch(unet, config=config)
    for name in ("group_offloading", "lazy_prefetch_group_offloading"):
        HookRegistry.check_if_exists_or_initialize(unet).remove_hook(name, recurse=True)
    assert torch.equal(predict_both(unet), patched)
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), predict_both(tiny_unet()))


def test_offloaded_pipeline():
    """`enable_model_cpu_offload` of a pipeline, before patching and after."""
    pipe = tiny_sd()
    plain = generate(pipe)
    patched = generate(agentsd.apply_patch(pipe))
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), patched)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), plain)
    assert torch.equal(check_cycle(pipe, lambda: generate(pipe)), patched)
    pipe.remove_all_hooks()
    assert torch.equal(generate(pipe), plain)


def test_lora_in_an_offloaded_pipeline(tmp_path):
    """PEFT LoRA in a sequentially offloaded model: patched, unpatched, and unloaded."""
    pipe = tiny_sd()
    plain = generate(pipe)
    pipe.load_lora_weights(save_lora(tmp_path))
    expected = generate(pipe)
    cpu_offload(pipe.unet, execution_device=CPU)
    patched = check_cycle(pipe, lambda: generate(pipe))
    agentsd.apply_patch(pipe)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(generate(pipe), patched)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), expected)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)


def test_lora_loaded_into_a_patched_and_group_offloaded_pipeline(tmp_path):
    """PEFT LoRA loaded into a patched model under group offload, for which diffusers puts its hooks in anew."""
    baseline = tiny_sd()
    plain = generate(baseline)
    baseline.load_lora_weights(save_lora(tmp_path))
    expected = generate(baseline)

    pipe = agentsd.apply_patch(tiny_sd())
    group_offload_leaves(pipe.unet)
    without = generate(pipe)
    pipe.load_lora_weights(tmp_path)
    assert_differs(generate(pipe), without)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), expected)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)
    assert_no_trace(pipe.unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@in_both_phases
def test_dtypes(dtype, config):
    """A model moved to another dtype while patched; the patch stays active and exact to remove."""
    unet = agentsd.apply_patch(tiny_unet(), config=config)
    in_fp32 = predict_both(unet)
    unet.to(dtype)
    patched = predict_both(unet)
    assert patched.dtype == dtype
    plain = predict_both(tiny_unet().to(dtype))
    assert_differs(patched, plain)
    # Closer to the patched model in float32 than the patch is to no patch: rounding, not another computation.
    assert (patched.float() - in_fp32).abs().mean() < 0.5 * (plain.float() - in_fp32).abs().mean()
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), plain)


@in_both_phases
def test_channels_last(config):
    """A model and its input in channels-last memory, before and after patching."""
    unet = agentsd.apply_patch(tiny_unet(), config=config)
    patched = predict_both(unet)
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(predict_both(unet), patched, rtol=1e-3, atol=1e-4)
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), predict_both(tiny_unet().to(memory_format=torch.channels_last)))
