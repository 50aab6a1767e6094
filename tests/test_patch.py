"""Patching and its undoing on real (small, random) models: again, for a while, with all that a pipeline holds."""

import copy
import warnings

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from models import tiny_controlnet, tiny_sd
from runs import EARLY, LATE, hook_count, image, inputs, run

import agentsd


def test_patching_twice_replaces(unet):
    once = run(agentsd.apply_patch(unet, ratio=0.5))
    hooks = hook_count(unet)
    agentsd.apply_patch(unet, ratio=0.2, merge_mlp=True)
    agentsd.apply_patch(unet, ratio=0.5)
    assert torch.equal(run(unet), once)
    assert hook_count(unet) == hooks


def test_upstreams_recipe_of_patching_again_in_mid_run(unet):
    """Upstream users patch at step 0 with agents and again at step 20 without."""
    scheduled = [run(agentsd.apply_patch(unet, ratio=0.3), t) for t in (EARLY, LATE)]
    early = run(agentsd.apply_patch(unet, ratio=0.3, sx=4, sy=4, agent_ratio=0.95), EARLY)
    late = run(agentsd.apply_patch(unet, ratio=0.3, sx=2, sy=2, agent_ratio=0.5), LATE)
    assert torch.equal(scheduled[0], early)
    assert torch.equal(scheduled[1], late)


def test_patched_restores_what_was_there(unet):
    plain = run(unet)
    with agentsd.patched(unet, ratio=0.5):
        assert agentsd.is_patched(unet)
    assert not agentsd.is_patched(unet)
    assert torch.equal(run(unet), plain)

    before = run(agentsd.apply_patch(unet, ratio=0.2, filter_fn=lambda name, _: name.startswith("up")))
    with pytest.raises(RuntimeError, match="inside"), agentsd.patched(unet, config=agentsd.AgentSDConfig(ratio=0.5)):
        raise RuntimeError("inside")
    assert torch.equal(run(unet), before)


def test_a_pipeline_takes_its_training_range_from_its_scheduler():
    pipe = tiny_sd()
    pipe.scheduler.register_to_config(num_train_timesteps=100)
    agentsd.apply_patch(pipe)
    sample, text = inputs(pipe.unet)
    pipe.unet(sample, 70, text)
    assert pipe.unet.agentsd_patch.clock.step.phases == (0,)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EDMDPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_whose_timesteps_are_noise_levels_is_warned_of_once(scheduler):
    """They are logarithms of the noise level, all below 2 of 1000, so that no step runs agents."""
    pipe = tiny_sd()
    pipe.scheduler = scheduler
    agentsd.apply_patch(pipe)
    with pytest.warns(UserWarning, match=r'no step is in the phase "agent".*preset\("agent"\)'):
        image(pipe)
    with warnings.catch_warnings(action="error", category=UserWarning):
        image(pipe)
        for config in (agentsd.AgentSDConfig.preset("agent"), agentsd.AgentSDConfig(agent_until=0)):
            image(agentsd.apply_patch(pipe, config=config))


def test_a_pipelines_controlnet_is_patched_with_it():
    pipe = tiny_sd()
    pipe.controlnet = tiny_controlnet(pipe.unet)
    agentsd.apply_patch(pipe)
    assert agentsd.is_patched(pipe.controlnet)
    assert {row.model for row in agentsd.report(pipe).rows} == {"unet", "controlnet"}
    assert not agentsd.is_patched(agentsd.remove_patch(pipe).controlnet)


def test_several_controlnets_are_patched_and_unpatched_together():
    nets = [tiny_controlnet(seed=seed) for seed in (0, 1)]
    together = MultiControlNetModel(nets)
    agentsd.apply_patch(together)
    assert agentsd.is_patched(together) and all(agentsd.is_patched(net) for net in nets)
    agentsd.remove_patch(together)
    assert not any(agentsd.is_patched(net) for net in nets)


def test_layers_of_a_controlnet_xs_are_those_of_its_unet():
    """The adapter that they were made from does not run: the report must not list its layers."""
    pipe = tiny_sd()
    pipe.controlnet = ControlNetXSAdapter.from_unet(pipe.unet, size_ratio=1.0)
    assert {row.model for row in agentsd.report(agentsd.apply_patch(pipe)).rows} == {"unet"}


def test_copies_do_not_share_the_patch(unet):
    twin = copy.deepcopy(agentsd.apply_patch(unet))
    expected = run(unet)
    agentsd.remove_patch(unet)
    assert agentsd.is_patched(twin)
    assert torch.equal(run(twin), expected)
    assert torch.equal(run(agentsd.remove_patch(twin)), run(unet))


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"preset": "balanced", "min_tokens": 0, "ratio": 0.1}, "`kv_ratio` says how many"),
        ({"preset": "fast", "min_tokens": 0, "ratio": 0.9}, "`kv_ratio` says how many"),
        ({"agent_until": 0, "late_phase": "kv-mean", "ratio": 0.3}, "of four, one is left"),
        ({"preset": "balanced"}, None),
        ({"preset": "balanced", "ratio": 0}, None),
        ({"late_phase": "kv-merged", "ratio": 0.3}, None),
        ({"preset": "tome", "ratio": 0.3}, None),
        ({"ratio": 0.3}, None),
    ],
    ids=str,
)
def test_a_ratio_without_effect_is_warned_of(unet, options, instead):
    """Where all steps merge keys and values alone; and it has none there, indeed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agentsd.apply_patch(unet, **options)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (instead is not None)
    if instead is not None:
        assert said[0].startswith(f"`ratio={options['ratio']:g}` changes nothing here") and instead in said[0]
        given = run(unet)
        assert torch.equal(run(agentsd.apply_patch(unet, **{**options, "ratio": 0.4})), given)
