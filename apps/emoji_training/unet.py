"""Stage three: the UNet, with the text encoder that the stage before began, trained together on the VAE's latents."""

import copy
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from .captions import Captions, distinct_scenes
from .clip import load_clip
from .compose import compose
from .images import image_grid
from .loop import (
    Checkpoint,
    Progress,
    autocast,
    descend,
    learning_rate,
    load_weights,
    new_state,
    pick_device,
    set_rate,
)
from .recipe import Recipe
from .scenes import SceneSource
from .sprites import Sprites
from .text import build_text_config, load_tokenizer, tokenize
from .vae import encode, load_vae


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

    Sampling starts from pure noise; a schedule that never quite reaches it teaches the model to find the image's
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
    pipe: StableDiffusionPipeline, prompts: Sequence[str], steps: int, recipe: Recipe, seed: int
) -> torch.Tensor:
    """uint8 images (N, 3, H, W), each from its own generator: a prompt's image does not depend on the others."""
    images = []
    for start in tqdm(range(0, len(prompts), recipe.judged_batch), desc=f"draw in {steps} steps", unit="batch"):
        chunk = list(prompts[start : start + recipe.judged_batch])
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(chunk))]
        # on a GPU in the precision that most will use it in; on a CPU that is slow
        with torch.autocast("cuda", torch.float16) if pipe.device.type == "cuda" else autocast(pipe.device):
            out = pipe(
                chunk,
                height=recipe.image_size,
                width=recipe.image_size,
                num_inference_steps=steps,
                guidance_scale=recipe.guidance,
                generator=generators,
                output_type="pt",
            ).images
        images.append((out.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images)


def sample_prompts(sprites: Sprites, recipe: Recipe, count: int, seed: int) -> list[str]:
    """Captions of random scenes, no two the same."""
    source = SceneSource(sprites.icons, recipe, f"samples {seed}")
    return list(distinct_scenes(source, Captions(sprites.icons), count))


def draw_times(count: int, total: int, recipe: Recipe, fraction: float, half: bool = False) -> torch.Tensor:
    """
    Timesteps for a batch, stratified for less variance from batch to batch; late ones dwell on the noisy end.

    `half` is for images of half the side, beside which the others need more noise to be as hard to see.
    """
    noisy = round(count * recipe.layout_samples) if fraction >= recipe.layout_from else 0
    low = round(total * (recipe.half_layout_noise if half else recipe.layout_noise))
    parts = [
        start + (torch.arange(part) + torch.rand(part)) * (total - start) / max(part, 1)
        for start, part in ((0, count - noisy), (low, noisy))
    ]
    return torch.cat(parts).long().clamp_(max=total - 1)  # a sum may round up to the next whole number


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the current ones; faster at the start, when the average is still young."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class LatentPool:
    """
    Encoded scenes that batches are taken from; every step replaces some by new ones.

    Composing and encoding a scene costs about half as much as a training step on it, and a latent serves many steps
    with other noise, at other times.

    At `scale` 2, images have half the side. Batches then have four times as many of them, for as many latent pixels
    as at 1, unless the recipe says how many go with the others.

    What the pool begins with is kept in `file`, if one is given: encoding it takes minutes.
    """

    def __init__(
        self,
        sprites: Sprites,
        recipe: Recipe,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        seed: str,
        scale: int = 1,
        file: Path | None = None,
    ):
        self.recipe, self.vae, self.tokenizer = recipe, vae, tokenizer
        self.sprites = sprites.smaller(recipe.sprite_size // scale) if scale > 1 else sprites
        self.side = recipe.image_size // scale
        mixed = scale > 1 and recipe.half_batch > 0
        self.factor = 1 if mixed else scale**2
        self.count = recipe.half_batch if mixed else self.factor * recipe.unet_batch
        self.source = SceneSource(sprites.icons, recipe, f"unet {seed}")
        self.captions, self.rng = Captions(sprites.icons), random.Random(f"words {seed}")
        size, device = recipe.latent_size // scale, sprites.images.device
        self.latents = torch.empty(recipe.unet_pool, 4, size, size, device=device)
        self.tokens = torch.empty(recipe.unet_pool, 77, dtype=torch.long, device=device)
        self.nothing = tokenize(tokenizer, [""])[0].to(device)
        self.next, self.due = 0, 0.0
        if file is not None and file.is_file():
            kept = load_file(file)
            self.latents, self.tokens = kept["latents"].to(device), kept["tokens"].to(device)
            return
        for start in tqdm(range(0, recipe.unet_pool, 64), desc="encode", unit="batch"):
            self._renew(min(64, recipe.unet_pool - start))
        if file is not None:
            unfinished = file.with_suffix(".part")
            save_file({"latents": self.latents, "tokens": self.tokens}, unfinished)
            unfinished.replace(file)

    def renew(self) -> None:
        """Put a step's new scenes in the place of the oldest; where it is less than one, that of several steps."""
        self.due += self.factor * self.recipe.unet_fresh
        count = int(self.due)
        if count:
            self._renew(count)
            self.due -= count

    def _renew(self, count: int) -> None:
        scenes = self.source.draw(count)
        rows = torch.arange(self.next, self.next + count).to(self.latents.device) % self.recipe.unet_pool
        self.latents[rows] = encode(self.vae, compose(scenes, self.sprites, self.side))
        captions = [self.captions.draw(scene, self.rng) for scene in scenes]
        self.tokens[rows] = tokenize(self.tokenizer, captions).to(self.tokens.device)
        self.next = (self.next + count) % self.recipe.unet_pool

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and token ids at random; some captions are dropped, for the unconditional case of guidance."""
        device = self.latents.device
        rows = torch.randint(self.recipe.unet_pool, (self.count,), device=device)
        dropped = torch.rand(self.count, 1, device=device) < self.recipe.caption_dropout
        return self.latents[rows], torch.where(dropped, self.nothing, self.tokens[rows])


class Trainer:
    """The state of the UNet stage."""

    def __init__(self, sprites: Sprites, recipe: Recipe, folder: Path):
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder = recipe, folder
        self.device = pick_device()
        self.sprites = sprites.to(self.device)
        self.tokenizer = load_tokenizer(sprites.icons, recipe, folder)
        self.vae = load_vae(recipe, folder)
        self.unet = build_unet(recipe).to(self.device, memory_format=torch.channels_last)
        self.text = load_clip(self.tokenizer, recipe, folder)[0].text_model.train()
        self.ema_unet, self.ema_text = copy.deepcopy(self.unet).eval(), copy.deepcopy(self.text).eval()
        self.scheduler = build_scheduler()
        self.parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.unet_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        models = {"unet": self.unet, "text": self.text, "ema_unet": self.ema_unet, "ema_text": self.ema_text}
        self.checkpoint = Checkpoint(folder / "unet", models, self.optimizer, recipe.checkpoint_seconds)
        compiled = recipe.compiled and self.device.type == "cuda"
        # for each of the two sizes by itself: what fits both is slower at either
        self.predict = torch.compile(self.unet, dynamic=False) if compiled else self.unet

    def loss(self, clean: torch.Tensor, tokens: torch.Tensor, fraction: float) -> torch.Tensor:
        """v-prediction error on a batch, after this fraction of the training."""
        noise = torch.randn_like(clean)
        total = self.scheduler.config.num_train_timesteps
        half = clean.shape[-1] < self.recipe.latent_size
        times = draw_times(len(clean), total, self.recipe, fraction, half).to(self.device)
        noisy = self.scheduler.add_noise(clean, noise, times).to(memory_format=torch.channels_last)
        with autocast(self.device):
            predicted = self.predict(noisy, times, self.text(tokens).last_hidden_state).sample
        return F.mse_loss(predicted.float(), self.scheduler.get_velocity(clean, noise, times))

    def sample(self, name: str) -> None:
        """Save a grid of what the averaged weights draw now, at each size that is judged."""
        pipe = build_pipeline(self.vae, self.ema_unet, self.ema_text, self.tokenizer)
        prompts = sample_prompts(self.sprites, self.recipe, self.recipe.sample_scenes, self.recipe.seed)
        for recipe in self.recipe.judged_sizes():
            images = generate(pipe, prompts, recipe.sample_steps, recipe, recipe.seed)
            path = self.folder / "samples" / f"{name}-{recipe.image_size}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image_grid(images[:, :, ::2, ::2], 8).save(path)

    def begin(self) -> dict:
        """The state before the first step; when tuning, the weights are those of the model to be tuned."""
        if not self.recipe.tuned:
            return new_state()
        for model in (self.unet, self.ema_unet):
            load_weights(model, self.folder / "start", "unet", unfinished=True)
        for model in (self.text, self.ema_text):
            state = load_weights(model, self.folder / "start", "text", unfinished=True)
        return state

    def pools(self, state: dict) -> tuple[LatentPool, LatentPool]:
        """Images of half the side, and of the whole."""
        # after a resume the draws must not repeat those of the first run
        seed = f"{self.recipe.seed} {state['step']}"
        coarse, fine = (
            LatentPool(
                self.sprites,
                self.recipe,
                self.vae,
                self.tokenizer,
                seed,
                scale,
                self.folder / "start" / f"pool-{scale}.safetensors" if self.recipe.tuned else None,
            )
            for scale in (2, 1)
        )
        return coarse, fine

    def run(self, minutes: float, resume: bool) -> None:
        """Train for `minutes`; the checkpoint ends in `folder`/unet."""
        recipe = self.recipe
        state = (self.checkpoint.load() if resume else None) or self.begin()
        if state.pop("finished", False) and state["elapsed"] >= 60 * minutes - 1:
            return  # a larger budget than it was trained with takes a finished stage further
        torch.manual_seed(recipe.seed + state["step"])
        coarse, fine = self.pools(state)
        for pool in (coarse, fine):
            self.loss(*pool.batch(), 0.0).backward()  # compiles, for minutes: not on the clock, which the rate follows
        self.optimizer.zero_grad(set_to_none=True)
        looked = time.monotonic()
        progress = Progress("unet", state, minutes, recipe.log_steps)
        for fraction in progress:
            own = state["step"] - state.get("begun", 0)  # steps of this optimizer and this average
            rate = learning_rate(recipe.unet_lr, fraction, own, recipe.warmup_steps, recipe.hold_until)
            set_rate(self.optimizer, rate)
            if recipe.half_batch:
                pools = {"full": fine, "half": coarse}
            else:
                pools = {"full": coarse if fraction < recipe.coarse_until else fine}
            losses = {}
            for size, pool in pools.items():
                pool.renew()
                losses[size] = self.loss(*pool.batch(), fraction)
            losses["loss"] = torch.stack(list(losses.values())).mean()
            descend(losses["loss"], self.optimizer)
            progress.end_step(losses)
            update_ema(self.ema_unet, self.unet, recipe.ema_decay, own)
            update_ema(self.ema_text, self.text, recipe.ema_decay, own)
            self.checkpoint.save_if_due(state)
            if time.monotonic() - looked > recipe.sample_seconds:
                self.sample(f"step-{state['step']:05d}")
                looked = time.monotonic()
        self.checkpoint.save(state | {"finished": True})


def train_unet(sprites: Sprites, recipe: Recipe, folder: Path, minutes: float, resume: bool) -> None:
    """Train the UNet and the text encoder for `minutes` on the VAE and the text encoder found in `folder`."""
    Trainer(sprites, recipe, folder).run(minutes, resume)


def load_trained(
    tokenizer: CLIPTokenizer, recipe: Recipe, folder: Path, unfinished: bool = False
) -> tuple[StableDiffusionPipeline, dict]:
    """The pipeline of the averaged weights in `folder`/unet, and that stage's state."""
    unet, text = build_unet(recipe), CLIPTextModel(build_text_config(recipe, tokenizer))
    state = load_weights(unet, folder / "unet", "ema_unet", unfinished)
    load_weights(text, folder / "unet", "ema_text", unfinished)
    vae = load_vae(recipe, folder)
    return build_pipeline(vae, unet.eval(), text.eval(), tokenizer).to(pick_device()), state
