"""What only a GPU can show. Run by name: `make test PYTEST_ARGS="-m cuda"`."""

import pytest
import torch
from models import tiny_sd, tiny_unet
from torch.profiler import ProfilerActivity, profile

import agentsd


pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("timestep", [900, 100])
def test_the_gpu_computes_what_the_cpu_computes(dtype, tolerance, timestep):
    """The partition is hashed with integers, so that it is the same on every device."""
    noise = torch.Generator().manual_seed(0)
    sample, text = torch.randn(3, 4, 17, 23, generator=noise), torch.randn(3, 77, 32, generator=noise)
    unet = agentsd.apply_patch(tiny_unet(), merge_mlp=True, merge_crossattn=True)
    with torch.no_grad():
        expected = unet(sample, timestep, text).sample
        unet.to("cuda", dtype)
        got = unet(sample.to("cuda", dtype), torch.tensor(timestep, device="cuda"), text.to("cuda", dtype)).sample
    assert got.dtype == dtype
    assert (got.cpu().float() - expected).norm() / expected.norm() < tolerance


def test_the_same_seed_gives_the_same_image():
    """Sums over merged tokens must not depend on the order in which threads come."""
    pipe = agentsd.apply_patch(tiny_sd().to("cuda", torch.float16))
    images = [
        pipe("a", num_inference_steps=5, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        for _ in range(3)
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_a_generation_copies_from_the_device_at_most_once_more_than_without_agentsd():
    pipe = tiny_sd().to("cuda", torch.float16)

    def copies() -> int:
        pipe("a", num_inference_steps=2, output_type="latent")
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            pipe("a", num_inference_steps=20, output_type="latent")
        return sum("DtoH" in event.name for event in record.events())

    plain = copies()
    agentsd.apply_patch(pipe)
    assert copies() <= plain + 1
