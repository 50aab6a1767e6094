"""Outputs of patched models that must never change by a bit, whatever is done to the code around the mathematics.

    python tests/recorded_outputs.py FILE

computes them again. Kernels that differ from processor to processor are switched off first, so that a file recorded on
one machine holds on another. What remains of such differences in the larger models, which are computed in double
precision, is rounded away.
"""

import os
import sys


if __name__ == "__main__":
    # Before torch is imported, which reads them once.
    os.environ.update(MKL_CBWR="COMPATIBLE", ATEN_CPU_CAPABILITY="default", OMP_NUM_THREADS="1")

import torch
from models import tiny_controlnet, tiny_refiner, tiny_sd, tiny_sd2, tiny_sdxl, tiny_unet
from runs import EARLY, LATE, image, inputs, run
from safetensors.torch import save_file

import agentsd
from agentsd import AgentSDConfig


def patched_unet(config, **unet):
    return agentsd.apply_patch(tiny_unet(**unet), config=config)


def with_controlnet():
    unet = tiny_unet()
    controlnet = tiny_controlnet(unet)
    for model in (unet, controlnet):
        agentsd.apply_patch(model, ratio=0.5)
    sample, text = inputs(unet)
    with torch.no_grad():
        down, middle = controlnet(
            sample, EARLY, text, torch.ones(2, 3, 128, 128).mul(0.3), return_dict=False, conditioning_scale=1.0
        )
        return unet(
            sample, EARLY, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample


def in_double(pipe):
    # Or the pipeline encodes images in float32.
    pipe.vae.register_to_config(force_upcast=False)
    return pipe.to(torch.float64)


def sdxl():
    pipe = agentsd.apply_patch(in_double(tiny_sdxl()), ratio=0.5, max_downsample=2)
    return image(pipe, num_inference_steps=4, output_type="latent", height=160, width=96).float()


def refiner():
    pipe = agentsd.apply_patch(in_double(tiny_refiner()), ratio=0.5)
    start = torch.linspace(0, 1, 3 * 128 * 128).reshape(1, 3, 128, 128)
    return image(pipe, image=start, strength=0.6, num_inference_steps=5, output_type="latent").float()


CASES = {
    "schedule, early": lambda: run(patched_unet(AgentSDConfig())),
    "schedule, late": lambda: run(patched_unet(AgentSDConfig()), timestep=LATE),
    "schedule, odd size": lambda: run(patched_unet(AgentSDConfig(ratio=0.5)), height=19, width=23, batch=3),
    "schedule, a timestep a sample": lambda: run(
        patched_unet(AgentSDConfig(ratio=0.5)), timestep=torch.tensor([EARLY, LATE, 640]), batch=3, height=24
    ),
    "agent, all levels": lambda: run(
        patched_unet(AgentSDConfig.preset("agent", ratio=0.6, max_downsample=8)), height=32, width=24
    ),
    "tome, no random choice": lambda: run(
        patched_unet(AgentSDConfig.preset("tome", ratio=0.7, use_rand=False, max_downsample=4))
    ),
    "own cells": lambda: run(
        patched_unet(AgentSDConfig(ratio=0.3, sx=3, sy=2, agent_ratio=0.9, seed=7, max_downsample=2)), height=20
    ),
    "own constants": lambda: run(patched_unet(AgentSDConfig(ratio=0.5, k_scale2=1.0, k_shortcut=0.2))),
    "everything merged, early": lambda: run(
        patched_unet(AgentSDConfig(ratio=0.5, merge_mlp=True, merge_crossattn=True))
    ),
    "everything merged, late": lambda: run(
        patched_unet(AgentSDConfig(ratio=0.5, merge_mlp=True, merge_crossattn=True, agent_until=0.3)), timestep=LATE
    ),
    "only the feed-forward": lambda: run(
        patched_unet(AgentSDConfig(ratio=0.5, merge_attn=False, merge_mlp=True, max_downsample=2))
    ),
    "half precision, fp32 attention": lambda: run(
        agentsd.apply_patch(tiny_sd2().unet.to(torch.bfloat16), ratio=0.4, attn_precision="fp32")
    ).float(),
    "with a ControlNet": with_controlnet,
    "SD 1.5, whole run": lambda: image(
        agentsd.apply_patch(tiny_sd(), ratio=0.4), num_inference_steps=6, output_type="latent", height=192
    ),
    "SDXL, whole run": sdxl,
    "refiner, whole run": refiner,
}


def compute() -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    with torch.backends.mkldnn.flags(enabled=False):
        return {name: case().contiguous() for name, case in CASES.items()}


if __name__ == "__main__":
    save_file(compute(), sys.argv[1], metadata={"torch": torch.__version__})
