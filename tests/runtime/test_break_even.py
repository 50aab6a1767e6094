"""From how many tokens on merging pays is the device's, which can be told before a model has run."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from models import tiny_unet

import agentsd
from agentsd.models.devices import device_of
from agentsd.runtime.break_even import least_tokens


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_only_what_is_left_to_agentsd_differs_by_device():
    assert least_tokens("auto", CPU) < least_tokens("auto", GPU) == least_tokens("auto", torch.device("mps"))
    assert least_tokens(9, CPU) == least_tokens(9, GPU) == 9


@pytest.mark.parametrize("size, runs", [((40, 48), False), ((40, 64), True)])
def test_layers_are_merged_from_that_number_on(size, runs):
    """1,920 tokens and 2,560 of them, on a CPU."""
    unet = tiny_unet().eval()
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, *size, generator=generator), torch.randn(1, 77, 32, generator=generator)
    with torch.no_grad():
        before = unet(sample, 500, text).sample
        agentsd.apply_patch(unet, preset="balanced", reuse=None)
        assert torch.equal(unet(sample, 500, text).sample, before) is not runs
    row = agentsd.report(unet).rows[0]
    assert (row.skipped is None) is runs
    if not runs:
        assert row.skipped == 'it has 1920 tokens, fewer than `min_tokens=2048`, which is what "auto" is on cpu'
    assert agentsd.report(unet).expected_speedup > 1 if runs else agentsd.report(unet).expected_speedup == 1


def test_a_model_of_plain_torch_is_where_its_weights_are():
    assert device_of(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2))) == CPU
    assert device_of(torch.nn.Linear(2, 2, device="meta")) == torch.device("meta")


def in_groups(unet, execution_device):
    if diffusers.__version__.startswith("0.40.") and not torch.cuda.is_available():
        pytest.skip("diffusers 0.40 offloads in groups only where there is a GPU")
    apply_group_offloading(unet, execution_device, CPU, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [cpu_offload, cpu_offload_with_hook, in_groups])
def test_a_model_that_is_offloaded_is_reported_for_where_it_will_run(offload):
    """Its weights are on the CPU, or nowhere, until then."""
    unet = agentsd.apply_patch(tiny_unet(), preset="balanced")
    assert device_of(unet) == CPU
    offload(unet, execution_device=GPU)
    assert device_of(unet) == GPU
    report = agentsd.report(unet, 1016, 1024)
    assert report.min_tokens == report.to_dict()["min_tokens"] == 16384
    reason = 'it has 16256 tokens, fewer than `min_tokens=16384`, which is what "auto" is on cuda'
    assert report.rows[0].skipped == reason
    assert agentsd.report(unet, 1024, 1024).rows[0].skipped is None
