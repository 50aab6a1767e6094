"""What the compatibility tests share: what they count, and what they put back."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch._dynamo.utils import counters

from agentsd.runtime import state


@pytest.fixture
def default_backend(monkeypatch):
    """What `set_attention_backend` makes the default of all models is put back after the test."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.fixture
def fresh_compiler():
    """What other tests have compiled is forgotten, and what this one does."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def matched(monkeypatch):
    """Counts how often tokens are matched."""
    counts = [0]

    def count(*args):
        counts[0] += 1
        return original(*args)

    def take():
        count, counts[0] = counts[0], 0
        return count

    original = state.match_tokens
    monkeypatch.setattr(state, "match_tokens", count)
    return take
