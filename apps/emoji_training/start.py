"""Where tuning starts: at the model that ships, its weights put where the training stages leave theirs."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, CLIPTextModel

from .archives import DataError


def is_started(folder: Path) -> bool:
    """Whether `folder` holds all that [`start_from`] leaves there."""
    return (folder / "start" / "state.json").is_file()


def start_from(model: Path, folder: Path) -> None:
    """
    Leave in `folder` what the stages would have left there had they trained the model in `model`.

    Its own steps and minutes come along: a tuning that lost its checkpoint goes on from the weights that it last
    exported, at the point of its schedule that they had reached. Only the optimizer starts anew.
    """
    facts_file = model / "training.json"
    if not facts_file.is_file():
        raise DataError(f"{model} holds no model to start from")
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32, use_safetensors=True)
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    clip = CLIPModel.from_pretrained(model / "clip", dtype=torch.float32, use_safetensors=True)
    shutil.rmtree(folder / "start", ignore_errors=True)  # with what was encoded by an earlier model
    shutil.copytree(model / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(model / "clip", folder / "start" / "clip")
    leave(folder / "vae", {"vae": vae}, state_of(facts["vae"]) | {"finished": True})
    leave(folder / "clip", {"clip": clip}, state_of(facts["clip"]) | {"finished": True})
    leave(folder / "start", {"unet": unet, "text": text}, unet_state(facts))


def unet_state(facts: dict) -> dict:
    """Where the UNet's training stands: at the point that an earlier tuning reached, or before its first step."""
    if facts.get("before"):
        return state_of(facts["unet"]) | {"before": facts["before"], "begun": facts["unet"]["steps"]}
    before = {key: facts[key] for key in ("recipe", "image_size", "coarse_until", "layout", "machine")} | facts["unet"]
    return {"step": 0, "elapsed": 0.0, "log": [], "before": before}


def state_of(stage: dict) -> dict:
    """The state of a stage from what the model's facts say of it."""
    return {
        "step": stage["steps"],
        "elapsed": 60 * stage["minutes"],
        "budget": stage["budget"],
        "loss": stage["loss"],
        "log": stage.get("log", []),
    }


def leave(stage: Path, models: dict[str, nn.Module], state: dict) -> None:
    """Write a stage's weights and state; the state last, by which a whole one is known."""
    stage.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights, stage / f"{name}.safetensors")
    (stage / "state.json").write_text(json.dumps(state), encoding="utf-8")
