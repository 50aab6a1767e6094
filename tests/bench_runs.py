"""Benchmarks of the small models of models.py that take seconds."""

from agentsd.bench import BenchSettings


TINY_SHAPE = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def speed(model, **values):
    given = {"models": (model,), "sizes": ((64, 64),), "steps": 2, "repeats": 2, "memory": False, "device": "cpu"}
    return BenchSettings.of_suite("speed", **{**given, **values})


def calls(**values):
    given = {"sizes": ((64, 64), (128, 64)), "repeats": 2, "memory": False}
    return BenchSettings.of_suite("cpu", **{**given, **values})


def quality(model, **values):
    given = {"models": (model,), "sizes": ((64, 64),), "steps": 2, "repeats": 1, "memory": False, "images": 3}
    return BenchSettings.of_suite(
        "quality", **{**given, "methods": ("baseline", "agentsd"), "device": "cpu", **values}
    )
