"""What all tests share."""

import gc
import json
import os
import shutil

import pytest
import torch


# Nothing is downloaded at test time: whoever tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are so small that a second thread costs more in waiting than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish():
    """The libraries stay: garbage is not looked for in their millions of objects, again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Some of them complain of what is left when Python ends."""
    gc.unfreeze()


@pytest.fixture
def unet():
    """A small UNet with random weights, not patched."""
    from models import tiny_unet

    return tiny_unet().eval()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small pipeline in a folder, as `save_pretrained` leaves it."""
    from models import tiny_sd

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def emoji_128(tmp_path_factory):
    """The embedded model with another size as its own, in pixels, at which it draws ten times as fast."""
    from agentsd.utils.loading import resolve_model

    folder = tmp_path_factory.mktemp("models") / "emoji"
    shutil.copytree(resolve_model("emoji"), folder, copy_function=os.symlink)
    config = folder / "unet" / "config.json"
    text = json.dumps(json.loads(config.read_text()) | {"sample_size": 128 // 8})
    config.unlink()
    config.write_text(text)
    return str(folder)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """The same model as one file in the original layout of Stable Diffusion."""
    from models import tiny_sd
    from original_layout import original_layout
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_file(original_layout(tiny_sd()), file)
    return file


@pytest.fixture
def shape(monkeypatch):
    """Benchmarks of the UNet of Stable Diffusion 1.5 get a small one."""
    from bench_runs import TINY_SHAPE

    from agentsd.bench.models import SHAPES

    monkeypatch.setitem(SHAPES, "sd15", TINY_SHAPE)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A CLIP model of the real architecture with random weights."""
    from models import tiny_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("models") / "clip"
    tokenizer = tiny_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = {**text, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**text, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=vision,
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
