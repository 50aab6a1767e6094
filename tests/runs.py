"""Short runs of the small models of models.py, with inputs that are the same every time."""

import torch


EARLY, LATE = 900, 100


def inputs(unet, batch=2, height=16, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = unet.dtype
    sample = torch.randn(batch, unet.config.in_channels, height, width, generator=generator).to(dtype)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator).to(dtype)
    return sample, text


@torch.no_grad()
def run(unet, timestep=EARLY, **size):
    sample, text = inputs(unet, **size)
    return unet(sample, timestep, text).sample


def image(pipe, seed=0, **options):
    options = {"num_inference_steps": 3, "output_type": "pt", **options}
    return pipe("a red apple", generator=torch.Generator().manual_seed(seed), **options).images


def hook_count(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
