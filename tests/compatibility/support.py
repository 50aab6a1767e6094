"""What the compatibility tests share: short runs, and the promise that every feature is held to."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TEXT_WIDTH

import agentsd
from agentsd import AgentAttnProcessor, AgentSDConfig


# One configuration for each half of the schedule, and the schedule itself.
AGENT, TOME = AgentSDConfig(agent_until=1.0), AgentSDConfig(agent_until=0.0)
PHASES = {"agent": AGENT, "tome": TOME}
in_both_phases = pytest.mark.parametrize("config", PHASES.values(), ids=PHASES)

# Of three steps, the one at timestep 667 runs agents; those at 334 and 1 only merge.
STEPS = 3


def generate(pipe: Any, **options: Any) -> torch.Tensor:
    """Latents of a short run with a fixed seed, with classifier-free guidance unless told otherwise."""
    settings = {
        "prompt": "a red apple",
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe(**{**settings, **options})[0]


def predict(model: Any, timestep: Any, batch: int = 2, size: int = 16, dtype: Any = None) -> torch.Tensor:
    """One call of a UNet on fixed noise."""
    dtype = dtype or next(model.parameters()).dtype
    noise = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, size, size, generator=noise).to(dtype)
    text = torch.randn(batch, 7, TEXT_WIDTH, generator=noise).to(dtype)
    return model(sample, timestep, encoder_hidden_states=text).sample


@torch.no_grad()
def predict_both(model: Any, **options: Any) -> torch.Tensor:
    """The calls of a UNet in the agent phase (timestep 900) and in the ToMe phase (timestep 100), stacked."""
    return torch.stack([predict(model, timestep, **options) for timestep in (900, 100)])


def fingerprint(*models: torch.nn.Module) -> list[Any]:
    """All that a patch could leave behind on models: keys, processors, attributes and hooks."""
    found: list[Any] = []
    for model in models:
        found.append(sorted(model.state_dict()))
        for name, module in model.named_modules():
            processor = getattr(module, "processor", None)
            attributes = sorted(key for key in vars(module) if "agentsd" in key)
            hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
            found.append((name, type(processor).__name__, attributes, *hooks))
    return found


def assert_no_trace(*models: torch.nn.Module) -> None:
    """Nothing of agentsd is left in a model: no processor, no attribute, no hook."""
    for model in models:
        for name, module in model.named_modules():
            assert not isinstance(getattr(module, "processor", None), AgentAttnProcessor), name
            assert not [key for key in vars(module) if "agentsd" in key], name
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                assert not type(getattr(hook, "__self__", None)).__module__.startswith("agentsd"), name


def assert_differs(result: torch.Tensor, other: torch.Tensor) -> None:
    """Two results are finite, of one shape, and differ well beyond rounding: in every entry of the first axis."""
    assert result.shape == other.shape
    assert torch.isfinite(result).all()
    for one, two in zip(result.float(), other.float(), strict=True):
        assert (one - two).abs().max() > 1e-3 * two.abs().max()


def check_cycle(
    target: Any, run: Callable[[], torch.Tensor], *models: torch.nn.Module, config: AgentSDConfig | None = None
) -> torch.Tensor:
    """
    The promise: patched, a model runs and gives something else; unpatched again, it is what it was, bit for bit.

    Returns the patched result.
    """
    models = models or (target.unet if hasattr(target, "unet") else target,)
    before, found = run(), fingerprint(*models)
    agentsd.apply_patch(target, config=config or AgentSDConfig())
    keys = [sorted(model.state_dict()) for model in models]
    patched = run()
    assert_differs(patched, before)
    assert torch.equal(run(), patched), "the same call gives another result the second time"
    agentsd.remove_patch(target)
    assert torch.equal(run(), before)
    assert fingerprint(*models) == found
    assert keys == [sorted(model.state_dict()) for model in models]
    assert_no_trace(*models)
    return patched


class AgentsdWarnings:
    """Counts the warnings of agentsd while a `with` block runs."""

    def __enter__(self) -> "AgentsdWarnings":
        self._catcher = warnings.catch_warnings(record=True)
        self._caught = self._catcher.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._catcher.__exit__(*exception)

    @property
    def count(self) -> int:
        """How many there were."""
        return sum("agentsd" in str(warning.message) for warning in self._caught)


def processor_names(model: torch.nn.Module) -> Counter:
    """How many layers run each kind of processor."""
    return Counter(type(processor).__name__ for processor in model.attn_processors.values())
