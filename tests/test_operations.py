"""Operations saved by a patch, against what a layer's own formula says."""

import pytest
import torch
from models import TEXT_WIDTH, tiny_sd, tiny_sdxl, tiny_unet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import agentsd
from agentsd.operations import expected_speedup
from agentsd.runtime.install import patch_of


def expected(unet, size=(16, 16), **options):
    agentsd.apply_patch(unet, **options)
    return expected_speedup(unet, patch_of(unet), *size)


def operations(unet):
    """Counted as the model runs, weights and all."""
    noise = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 16, 16, generator=noise), torch.randn(1, 77, TEXT_WIDTH, generator=noise)
    # The fused kernel of CPUs is not among those that torch counts.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(sample, 500, encoder_hidden_states=text)
    return counter.get_total_flops()


@pytest.mark.parametrize("options", [{"preset": "tome"}, {"preset": "agent"}, {"sx": 2, "sy": 2, "merge_mlp": True}])
def test_it_is_what_the_model_runs(options):
    unet = tiny_unet()
    plain = operations(unet)
    assert expected(unet, **options) == plain / operations(unet) > 1


def test_nothing_is_saved_where_nothing_runs_otherwise():
    assert expected(tiny_unet(), ratio=0, reuse=1) == 1
    assert expected(tiny_unet(), min_tokens=257) == 1


def test_more_reuse_saves_more():
    """A run in which no step but every `n`-th has the deep part takes no less than an `n`-th of the operations."""
    two, three = (expected(tiny_unet(), ratio=0, reuse=interval) for interval in (2, 3))
    assert 1 < two < 2 < three + 1 < 4
    assert 1 / three - 1 / 3 == pytest.approx(2 / 3 * (2 / two - 1)), "the same step that reuses"


def test_techniques_multiply():
    alone, reuse, both = (
        expected(tiny_unet(), size=(64, 64), **options) for options in ({}, {"ratio": 0, "reuse": 2}, {"reuse": 2})
    )
    assert both > max(alone, reuse)


def test_matching_counts_for_the_steps_that_match():
    """Of the share of the operations that never matching saves, matching in every `n`-th step saves all but `1/n`."""
    options = {"preset": "tome", "ratio": 0.4}
    off, one, two, four = (
        1 / expected(tiny_unet(), (64, 64), **options, match_interval=interval) for interval in (None, 1, 2, 4)
    )
    assert off == one
    assert off - four == pytest.approx(3 / 2 * (off - two)) and off > two
    reuse, kept = (1 / expected(tiny_unet(), (64, 64), **options, reuse=2, match_interval=n) for n in (None, 1))
    assert kept < reuse


def test_matching_counts_once_for_the_layers_that_share_it():
    """Of three layers one in the down block, two in the up block: a level saves twice what blocks do."""
    off, block, level = (
        1 / expected(tiny_unet(), (64, 64), preset="tome", ratio=0.4, share_matches=group)
        for group in (None, "block", "level")
    )
    assert off > block
    assert off - level == pytest.approx(2 * (off - block))


def test_the_late_phase_counts_for_its_share_of_the_steps():
    whole, half, none = (
        1 / expected(tiny_unet(), (64, 64), agent_until=until, late_phase="kv-mean") for until in (0.0, 0.5, 1.0)
    )
    assert half == pytest.approx((whole + none) / 2)


def test_the_report_says_it_where_the_size_is_known():
    pipe = agentsd.apply_patch(tiny_sd(), reuse=2)
    assert agentsd.report(pipe).expected_speedup is None
    report = agentsd.report(pipe, 128, 128)
    assert report.expected_speedup == expected_speedup(pipe.unet, patch_of(pipe.unet), 16, 16) > 1
    assert f"by operations: {report.expected_speedup:.2f}x" in str(report)
    pipe("a red apple", num_inference_steps=1, height=128, width=128, output_type="latent")
    assert agentsd.report(pipe).expected_speedup == report.expected_speedup


def test_of_models_with_other_conditions():
    assert expected(tiny_sdxl().unet, ratio=0, reuse=2) > 1
    assert expected(tiny_unet(num_class_embeds=4), ratio=0, reuse=2) > 1


def test_the_model_itself_is_not_touched():
    unet = tiny_unet().to(torch.bfloat16)
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    weights = {name: weight.data_ptr() for name, weight in unet.named_parameters()}
    assert expected(unet, reuse=3) > 1
    assert calls == []
    assert {name: weight.data_ptr() for name, weight in unet.named_parameters()} == weights
