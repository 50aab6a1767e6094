"""What the compatibility tests put back."""

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture
def default_backend(monkeypatch):
    """What `set_attention_backend` makes the default of all models is put back after the test."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
