"""Options: the defaults users know, the two-phase schedule, and errors at the border."""

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from agentsd import AgentSDConfig, FeatureReuseConfig
from agentsd.patch_report import token_counts


def shape(phase):
    """Cells, shares of tokens merged away, and of those merged away for the agents."""
    agent_ratio = None if phase.operator is None else phase.operator.config.agent_ratio
    return phase.cells.sx, phase.cells.sy, phase.tokens.config.ratio, agent_ratio


def test_nothing_named_gives_the_schedule_of_the_paper():
    agent, tome = AgentSDConfig(ratio=0.3).phases
    assert (agent.name, *shape(agent), agent.until) == ("agent", 4, 4, 0.3, 0.95, 0.4)
    assert (tome.name, *shape(tome), tome.until) == ("tome", 2, 2, 0.3, None, 1.0)


def test_it_cannot_be_changed_behind_its_checks():
    config = AgentSDConfig()
    with pytest.raises(FrozenInstanceError):
        config.ratio = 2.0
    assert len({config, AgentSDConfig(), AgentSDConfig(ratio=0.2)}) == 2


@pytest.mark.parametrize(
    "named, expected",
    [
        ({"sx": 4}, (4, 2, 0.4, 0.8)),
        ({"sy": 4}, (2, 4, 0.4, 0.8)),
        ({"agent_ratio": 0.95}, (2, 2, 0.4, 0.95)),
        ({"sx": 4, "sy": 4, "agent_ratio": 0.95}, (4, 4, 0.4, 0.95)),
    ],
)
def test_naming_a_cell_option_fixes_one_phase_with_upstream_defaults(named, expected):
    (phase,) = AgentSDConfig(**named).phases
    assert (phase.name, *shape(phase)) == ("all steps", *expected)


def test_agent_phase_has_one_agent_a_cell_and_tome_phase_none():
    agent, tome = AgentSDConfig(ratio=0.4).phases
    assert token_counts(agent, 64, 64).agents == 256
    assert token_counts(tome, 64, 64).agents is None


def test_upstreams_old_default_shows_that_it_uses_no_agents():
    assert token_counts(*AgentSDConfig(ratio=0.5, sx=2).phases, 64, 64).agents is None
    assert token_counts(*AgentSDConfig(ratio=0.4, sx=2).phases, 64, 64).agents == 1024


def test_cells_larger_than_the_layer_merge_nothing():
    assert token_counts(AgentSDConfig().phases[0], 3, 64).merged == 192


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.75, 0.99])
@pytest.mark.parametrize("size", [(64, 64), (13, 7), (2, 3), (5, 4)])
def test_presets_hold_one_phase_for_all_steps(ratio, size):
    (agent,), (tome,) = (AgentSDConfig.preset(name, ratio=ratio).phases for name in ("agent", "tome"))
    scheduled = AgentSDConfig.preset("paper", ratio=ratio).phases
    assert [token_counts(phase, *size) for phase in (agent, tome)] == [
        token_counts(phase, *size) for phase in scheduled
    ]
    assert shape(agent) == shape(scheduled[0])
    with pytest.raises(ValueError, match="paper"):
        AgentSDConfig.preset("faster")
    with pytest.raises(ValueError, match=r"no preset \['fast'\]"):
        AgentSDConfig.preset(["fast"])


@pytest.mark.parametrize("named", [{"sx": 4}, {"sy": 1}, {"agent_ratio": 0.5}, {"sx": 2, "sy": 2, "agent_ratio": 0}])
@pytest.mark.parametrize("until", [0, 0.4, 1])
def test_an_option_without_effect_is_an_error(named, until):
    """Not silence: one phase for all steps has no agent phase that could end."""
    with pytest.raises(ValueError, match="`agent_until` would have no effect beside `" + next(iter(named))):
        AgentSDConfig(**named, agent_until=until)
    assert AgentSDConfig(**named).agent_until is None


def test_the_ratio_of_keys_is_for_merged_ones():
    assert AgentSDConfig(late_phase="kv-merged").kv_ratio == 0.75
    assert AgentSDConfig(late_phase="kv-merged", kv_ratio=0.9).phases[1].keys.config.ratio == 0.9
    assert AgentSDConfig(late_phase="kv-mean").kv_ratio is None
    for others in ({}, {"late_phase": "kv-mean"}, {"sx": 2}):
        with pytest.raises(ValueError, match="`kv_ratio` is about `late_phase='kv-merged'`"):
            AgentSDConfig(kv_ratio=0.75, **others)
    with pytest.raises(ValueError, match=r"`kv_ratio` must be in \[0, 1\)"):
        AgentSDConfig(late_phase="kv-merged", kv_ratio=1)


def test_presets_with_feature_reuse():
    balanced, fast = (AgentSDConfig.preset(name) for name in ("balanced", "fast"))
    assert (balanced.reuse.interval, balanced.is_scheduled) == (2, True)
    assert (fast.reuse.interval, fast.is_scheduled) == (3, True)
    assert all((config.max_downsample, config.min_tokens) == (2, "auto") for config in (balanced, fast))
    assert [config.phases[1].keys.config.ratio for config in (balanced, fast)] == [0.75, 0.9]
    assert balanced.phases[0].until == fast.phases[0].until == 0
    assert (balanced.match_interval, fast.match_interval) == (1, 1)
    alone = AgentSDConfig.preset("balanced", reuse=None, min_tokens=0, match_interval=None)
    assert alone == AgentSDConfig(agent_until=0, late_phase="kv-merged", max_downsample=2)
    assert AgentSDConfig.preset("balanced", reuse=FeatureReuseConfig(4)).reuse.interval == 4
    assert AgentSDConfig.from_dict(json.loads(json.dumps(fast.to_dict()))) == fast


def test_the_least_number_of_tokens_may_be_that_of_the_device():
    assert AgentSDConfig(min_tokens="auto").min_tokens == "auto"
    assert AgentSDConfig.from_dict(AgentSDConfig(min_tokens="auto").to_dict()) == AgentSDConfig(min_tokens="auto")
    with pytest.raises(ValueError, match="`min_tokens` must be an integer or 'auto', but got 'cpu'"):
        AgentSDConfig(min_tokens="cpu")
    with pytest.raises(TypeError, match="`min_tokens` must be an integer"):
        AgentSDConfig(min_tokens=2.5)


def test_a_preset_refuses_it_too():
    with pytest.raises(ValueError, match="agent_until"):
        AgentSDConfig.preset("agent", agent_until=0.3)
    assert AgentSDConfig.preset("paper", agent_until=0.3).agent_until == 0.3
    assert AgentSDConfig().agent_until == 0.4


@pytest.mark.parametrize(
    ("name", "override", "said", "cleared"),
    [
        (
            "fast",
            {"late_phase": "tome"},
            r"`kv_ratio` is about .*'fast' sets agent_until=0, kv_ratio=0\.9, max_",
            "kv_ratio",
        ),
        (
            "agent",
            {"agent_until": 0.3},
            r"`agent_until` would .*'agent' sets sx=4, sy=4, agent_ratio=0\.95: give None",
            None,
        ),
        (
            "balanced",
            {"merge_attn": False},
            r"merge_attn.*The preset 'balanced' sets .*late_phase='kv-merged'",
            "late_phase",
        ),
    ],
)
def test_what_a_preset_sets_is_named_where_it_is_in_the_way(name, override, said, cleared):
    """Who overrides one of its fields has not seen the others."""
    with pytest.raises(ValueError, match=said):
        AgentSDConfig.preset(name, **override)
    if cleared is not None:
        AgentSDConfig.preset(name, **override, **{cleared: None})


def test_what_is_wrong_without_a_preset_is_said_alone():
    with pytest.raises(ValueError, match=r"^`ratio` must be in \[0, 1\), but got 2\.$"):
        AgentSDConfig.preset("fast", ratio=2)


def test_dictionary_round_trip():
    config = AgentSDConfig(ratio=0.2, sx=3, merge_mlp=True, attn_precision="fp32")
    assert AgentSDConfig.from_dict(config.to_dict()) == config
    assert AgentSDConfig.from_dict(AgentSDConfig().to_dict()) == AgentSDConfig()


def test_numbers_of_numpy_become_plain_ones():
    """Sweeps are often written with `np.linspace`."""
    config = AgentSDConfig(
        ratio=np.float32(0.5), k_scale2=np.float64(0.3), sx=np.int64(4), seed=np.uint8(3), k_shortcut=0
    )
    assert config == AgentSDConfig(ratio=0.5, sx=4, seed=3, k_shortcut=0.0)
    assert [type(value) for value in (config.ratio, config.k_scale2, config.sx, config.seed)] == [
        float,
        float,
        int,
        int,
    ]
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    with pytest.raises(TypeError, match="`ratio` must"):
        AgentSDConfig(ratio=np.bool_(True))


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("ratio", 1, ValueError),
        ("ratio", -0.1, ValueError),
        ("ratio", float("nan"), ValueError),
        ("ratio", "0.4", TypeError),
        ("ratio", True, TypeError),
        ("max_downsample", 3, ValueError),
        ("max_downsample", 1.0, TypeError),
        ("sx", 0, ValueError),
        ("sy", 2.0, TypeError),
        ("match_interval", 0, ValueError),
        ("match_interval", True, TypeError),
        ("match_interval", 2.0, TypeError),
        ("agent_ratio", 1.1, ValueError),
        ("agent_until", 2, ValueError),
        ("k_scale2", None, TypeError),
        ("k_shortcut", float("inf"), ValueError),
        ("attn_precision", "fp16", ValueError),
        ("share_matches", "layer", ValueError),
        ("share_matches", True, ValueError),
        ("use_rand", 1, TypeError),
        ("seed", 0.5, TypeError),
        ("merge_mlp", "yes", TypeError),
    ],
)
def test_bad_values_are_named(name, value, error):
    with pytest.raises(error, match=f"`{name}` must"):
        AgentSDConfig(**{name: value})


@pytest.mark.parametrize(
    "name, value",
    [("ratio", 0), ("agent_until", 0), ("agent_until", 1), ("agent_ratio", 0), ("agent_ratio", 1), ("sx", 1)],
)
def test_values_at_the_ends_of_their_ranges_are_taken(name, value):
    assert getattr(AgentSDConfig(**{name: value}), name) == value


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(TypeError, match=r"'ratios'.*The options are: ratio,"):
        AgentSDConfig.from_dict({"ratios": 0.4})
