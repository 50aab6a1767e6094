"""What all tests share."""

import os

import pytest
import torch


# Nothing is downloaded at test time: whoever tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are so small that a second thread costs more in waiting than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def unet():
    """A small UNet with random weights, not patched."""
    from models import tiny_unet

    return tiny_unet().eval()
