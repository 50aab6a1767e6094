"""Stage two: the UNet and its text encoder, trained together on the VAE's latents."""

import copy
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .data import Icon, captions_of, render_variants
from .loop import Checkpoint, Clock, autocast, learning_rate, load_weights, pick_device, ticks
from .recipe import Recipe
from .text import build_text_encoder, train_tokenizer
from .vae import encode, load_vae, picture_grid


# Drawn at every look during training and, with the same seed, in the model card.
SAMPLE_PROMPTS: tuple[str, ...] = (
    "a red apple",
    "a pineapple",
    "a strawberry",
    "a hamburger",
    "a birthday cake",
    "a cup of coffee",
    "a cat face",
    "a panda face",
    "a tiger face",
    "a frog face",
    "a butterfly",
    "a ladybug",
    "a sunflower",
    "a fir tree",
    "a maple leaf",
    "a rainbow",
    "a blue heart",
    "a red heart",
    "a balloon",
    "a rocket",
    "a crown",
    "a soccer ball",
    "a house",
    "a smiling face",
)


def build_unet(recipe: Recipe) -> UNet2DConditionModel:
    """A UNet with fresh weights, laid out like SD 1.5's: attention in the middle and on all levels but the lowest."""
    depth = len(recipe.unet_channels)
    return UNet2DConditionModel(
        sample_size=recipe.latent_size,
        down_block_types=("CrossAttnDownBlock2D",) * (depth - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (depth - 1),
        block_out_channels=recipe.unet_channels,
        layers_per_block=recipe.unet_layers,
        norm_num_groups=recipe.unet_groups,
        cross_attention_dim=recipe.text_width,
        # diffusers reads this as the number of heads
        attention_head_dim=tuple(channels // recipe.unet_head_width for channels in recipe.unet_channels),
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM on SD's noise schedule, stretched to end in pure noise.

    Sampling starts from pure noise; a schedule that never quite reaches it teaches the model to find the picture's
    mean in what is left, and then white backgrounds come out tinted.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def build_tokenizer(icons: list[Icon], recipe: Recipe) -> CLIPTokenizer:
    """The tokenizer for the captions of `icons`; the same every time."""
    return train_tokenizer([caption for icon in icons for caption in captions_of(icon.name)], recipe.vocabulary)


def build_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """A plain Stable Diffusion pipeline of the parts."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int = 0
) -> torch.Tensor:
    """uint8 pictures (N, 3, H, W), each from its own generator: a prompt's picture does not depend on the others."""
    pictures = []
    for start in range(0, len(prompts), 8):
        chunk = prompts[start : start + 8]
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(chunk))]
        with autocast(pipe.device):
            out = pipe(
                chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
            ).images
        pictures.append((out.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(pictures)


def draw_times(count: int, total: int, recipe: Recipe, fraction: float) -> torch.Tensor:
    """Timesteps for a batch, stratified for less variance from batch to batch; late ones dwell on the noisy end."""
    noisy = round(count * recipe.layout_samples) if fraction >= recipe.layout_from else 0
    low = round(total * recipe.layout_noise)
    parts = [
        start + (torch.arange(part) + torch.rand(part)) * (total - start) / max(part, 1)
        for start, part in ((0, count - noisy), (low, noisy))
    ]
    return torch.cat(parts).long()


def draw_captions(names: list[str], dropout: float, rng: random.Random) -> list[str]:
    """A random caption each; some are dropped, so that the model also learns the unconditional case guidance needs."""
    return ["" if rng.random() < dropout else rng.choice(captions_of(name)) for name in names]


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the current ones; faster at the start, when the average is still young."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Trainer:
    """The state of the UNet stage."""

    def __init__(self, icons: list[Icon], recipe: Recipe, folder: Path):
        torch.manual_seed(recipe.seed)
        self.icons, self.recipe, self.folder = icons, recipe, folder
        self.device = pick_device()
        self.rng = random.Random(recipe.seed)
        self.tokenizer = build_tokenizer(icons, recipe)
        self.vae = load_vae(recipe, folder)
        self.unet = build_unet(recipe).to(self.device, memory_format=torch.channels_last)
        self.text = build_text_encoder(recipe, self.tokenizer).to(self.device).train()
        self.ema_unet, self.ema_text = copy.deepcopy(self.unet).eval(), copy.deepcopy(self.text).eval()
        self.scheduler = build_scheduler()
        parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=recipe.unet_lr, betas=(0.9, 0.99), weight_decay=0.01)
        models = {"unet": self.unet, "text": self.text, "ema_unet": self.ema_unet, "ema_text": self.ema_text}
        self.checkpoint = Checkpoint(folder / "unet", models, self.optimizer, recipe.checkpoint_seconds)

    def scaled_latents(self, reuse: bool) -> torch.Tensor:
        """Scaled latents of all renders, (icons, variants, 4, h, w); sets the VAE's scaling factor from them.

        They are kept on disk, so that a resumed run need not render and encode again.
        """
        kept = self.folder / "latents.safetensors"
        if reuse and kept.is_file():
            latents = load_file(kept)["latents"]
        else:
            images = render_variants(
                self.icons, self.recipe.image_size, self.recipe.unet_variants, self.recipe.seed + 1
            )
            latents = encode(self.vae, images.flatten(0, 1)).unflatten(0, images.shape[:2]).contiguous()
            save_file({"latents": latents}, kept)
        scale = 1.0 / float(latents.std())
        self.vae.register_to_config(scaling_factor=scale)
        return latents * scale

    def embed(self, captions: list[str]) -> torch.Tensor:
        """Text states for the cross-attention, as the pipeline makes them."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        return self.text(tokens.input_ids.to(self.device)).last_hidden_state

    def loss(self, latents: torch.Tensor, fraction: float) -> torch.Tensor:
        """v-prediction error on one random batch, after this fraction of the training."""
        count = self.recipe.unet_batch
        rows = torch.randint(latents.shape[0], (count,))
        clean = latents[rows, torch.randint(latents.shape[1], (count,))].to(self.device)
        captions = draw_captions([self.icons[row].name for row in rows], self.recipe.caption_dropout, self.rng)
        noise = torch.randn_like(clean)
        times = draw_times(count, self.scheduler.config.num_train_timesteps, self.recipe, fraction).to(self.device)
        noisy = self.scheduler.add_noise(clean, noise, times).to(memory_format=torch.channels_last)
        with autocast(self.device):
            predicted = self.unet(noisy, times, self.embed(captions)).sample
        return F.mse_loss(predicted.float(), self.scheduler.get_velocity(clean, noise, times))

    def sample(self, name: str) -> None:
        """Save a grid of what the averaged weights draw now."""
        pipe = build_pipeline(self.vae, self.ema_unet, self.ema_text, self.tokenizer)
        pictures = generate(pipe, list(SAMPLE_PROMPTS), self.recipe.sample_steps, self.recipe.guidance)
        path = self.folder / "samples" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(pictures[:, :, ::2, ::2], 6).save(path)

    def run(self, minutes: float, resume: bool) -> None:
        """Train for `minutes`; the checkpoint ends in `folder`/unet."""
        state = (self.checkpoint.load() if resume else None) or {"step": 0, "elapsed": 0.0, "log": []}
        if state.pop("finished", False) and state["elapsed"] >= 60 * minutes - 1:
            return  # a larger budget than it was trained with takes a finished stage further
        # after a resume the draws must not repeat those of the first run
        torch.manual_seed(self.recipe.seed + state["step"])
        self.rng.seed(self.recipe.seed + state["step"])
        latents = self.scaled_latents(reuse=resume)
        clock, looked, recent = Clock(minutes, state["elapsed"]), time.monotonic(), []
        state["budget"] = minutes
        for bar in ticks(clock, "unet"):
            rate = learning_rate(self.recipe.unet_lr, clock.fraction, state["step"], self.recipe.warmup_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.loss(latents, clock.fraction)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            state["step"] += 1
            state["elapsed"] = clock.elapsed
            update_ema(self.ema_unet, self.unet, self.recipe.ema_decay, state["step"])
            update_ema(self.ema_text, self.text, self.recipe.ema_decay, state["step"])
            recent.append(loss.item())
            if len(recent) == 10:
                mean, recent = sum(recent) / 10, []
                state["log"].append({"step": state["step"], "minutes": clock.elapsed / 60, "loss": mean})
                bar.set_postfix(step=state["step"], loss=f"{mean:.4f}")
            self.checkpoint.save_if_due(state)
            if time.monotonic() - looked > self.recipe.sample_seconds:
                self.sample(f"step-{state['step']:05d}")
                looked = time.monotonic()
        self.checkpoint.save(state | {"finished": True})


def train_unet(icons: list[Icon], recipe: Recipe, folder: Path, minutes: float, resume: bool) -> None:
    """Train the UNet and the text encoder for `minutes` on the VAE found in `folder`."""
    Trainer(icons, recipe, folder).run(minutes, resume)


def load_trained(icons: list[Icon], recipe: Recipe, folder: Path) -> tuple[StableDiffusionPipeline, dict]:
    """The pipeline of the averaged weights in `folder`/unet, and that stage's state."""
    tokenizer = build_tokenizer(icons, recipe)
    unet, text = build_unet(recipe), build_text_encoder(recipe, tokenizer)
    state = load_weights(unet, folder / "unet", "ema_unet")
    load_weights(text, folder / "unet", "ema_text")
    vae = load_vae(recipe, folder)
    return build_pipeline(vae, unet.eval(), text.eval(), tokenizer), state
