"""The model card, a template filled with the numbers the export stage measured."""

import textwrap


TEMPLATE = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: en
tags:
- stable-diffusion
- text-to-image
- emoji
---

# emoji

A very small Stable Diffusion trained on {count} emoji drawings, {size} MB in all. It exists so that `agentsd` can be
tried and tested on a real text-to-image model without a download of gigabytes. It is not a general picture
generator: it was only shown the {count} things listed below, one at a time, on white.
{state}
```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("agentsd/models/emoji")  # or dtype=torch.float16
pipe("a red apple", num_inference_steps=20, guidance_scale=4).images[0].save("apple.png")
```

A guidance of about 4 gives cleaner pictures than the pipeline's default of 7.5.

![Samples](samples.png)

Not picked: {sample_steps} DDIM steps, guidance 7.5 (the pipeline's default), seeds counting up from {seed}. Prompts,
row by row:
{sample_prompts}.

## What is inside

| part | parameters | |
| --- | ---: | --- |
| `AutoencoderKL` | {vae_parameters} M | factor 8, 4 latent channels, latents standardised per channel |
| `UNet2DConditionModel` | {unet_parameters} M | self- and cross-attention at 32×32 (1,024 tokens), 16×16, 8×8 |
| `CLIPTextModel` | {text_parameters} M | two layers, an own BPE vocabulary of {vocabulary} tokens |
| `DDIMScheduler` | | v-prediction, noise schedule that ends in pure noise, trailing steps |
| `CLIPModel` in `clip/` | {image_parameters} M for pictures | not part of the pipeline: judges pictures, see below |

Pictures are 256×256. The weights are float16 safetensors; they load and run in float32 and in float16. Any prompt
tokenizes. There is no safety checker: the model has only ever seen the drawings below.

## Data

{count} drawings of [Noto Emoji](https://github.com/googlefonts/noto-emoji) (Copyright Google, Apache License 2.0), in
the SVG form of the npm package `@iconify-json/noto`, rendered at 256 px on white, slightly moved and shrunk; the VAE
also saw them mirrored and with colour channels swapped. Captions come from the names by templates ("a red apple",
"a drawing of a red apple", "red apple emoji" …), with some synonyms and colour words. The drawings themselves are not
part of this package.

## Recipe

One command does all of it, from fetching the drawings to this card; with `--stage` and `--resume` it also runs in
parts, as it did for these weights:

```
python apps/train_emoji.py --stage all
```

| stage | time on {machine} | steps | final loss |
| --- | ---: | ---: | ---: |
| VAE | {vae_minutes} of {vae_budget} min | {vae_steps} | {vae_loss} |
| UNet and text encoder | {unet_minutes} of {unet_budget} min | {unet_steps} | {unet_loss} |
| image encoder | {clip_minutes} of {clip_budget} min | {clip_steps} | {clip_loss} |

- VAE: L1 + 0.5 L1 of the gradients + L1 of 4-pixel colour averages, colour differences weighing most, + a small KL.
  At first three latent channels are pulled towards the colours of 8×8 pixels, so that hue is not learnt last.
  Crops first, whole pictures later.
- UNet and text encoder: v-prediction on the VAE's latents, 10 % of the captions dropped for classifier-free guidance,
  averaged weights (EMA). All noise levels alike for the first {layout_from} % of the time; then {layout_samples} % of
  the samples from the noisiest {layout_noise} % of the range, where it is decided what is drawn where.
- Image encoder: a vision transformer, trained with CLIP's contrastive loss against the text encoder, which stays as it
  is; on renders, and on renders that went through the VAE, with some blur and noise.
- All: AdamW, cosine learning rate over the time budget, bf16 autocast, seed {seed}. {software}. Times are
  wall clock on a machine that was busy with other work too: an idle one takes more steps in the same minutes. As
  the learning rate follows the clock, a second run gives a model alike, not the same weights.

![Loss](loss.png)

## Measured

- VAE reconstruction: {psnr_trained} dB PSNR on new placements of the trained drawings{psnr_unseen}.
  Colours: the mean over 8×8 pixels is off by {colour_error} of 255 levels where something is drawn.
- Does a picture show what was asked for? Each of the {count} prompts drawn once, {match_steps} steps; the nearest of
  all trained drawings by pixels at 16×16 (48 placements each) is the one named in **{top1_low} %** of the cases at
  guidance 4 and **{top1} %** at 7.5; it is among the five nearest in {top5_low} % and {top5} %. Chance is {chance} %.
  It says whether colours and rough shape are right, not how good a picture is; the right colour alone is already worth
  much more than chance.
- The same asked of the image encoder: of all {count} prompts the nearest to a picture in CLIP's space is its own for
  **{clip_low} %** of the pictures drawn at guidance 4 and **{clip_default} %** at 7.5 (among the five nearest:
  {clip_low5} % and {clip_default5} %), and for {clip_real} % of fresh renders ({clip_real5} %). It has seen renders
  of these drawings and nothing else: its distances say something about pictures of this model, nothing about others.

## What it cannot do

- Anything that is not in the list: other words give one of the known drawings, or a blend of several.
- Scenes, several objects, counting, backgrounds, styles, text. "A red apple and a cat" is not two things to it.
- Colours other than those it saw: nothing taught it "a purple apple".
- Sizes other than 256×256 run, but the pictures fall apart the further one goes.
- Fine detail, and regular shapes: the model had {total_minutes} minutes of training on {machine}.
- Stand for diverse pictures: whatever a method does to these {count} drawings is weak evidence for photographs.

## The prompts it knows

{prompts}
"""

# Said when the measured match rate is below GOOD_MATCH.
UNDERTRAINED = """
**This checkpoint is under-trained.** Colours, size and place mostly follow the prompt, shapes do not: expect patches
of the right colour, not drawings one can name. It serves to run and time the code, not to judge picture quality.
"""
GOOD_MATCH = 0.5


def listed(items: list[str]) -> str:
    """Quoted, comma-separated, wrapped."""
    return textwrap.fill(", ".join(f"“{item}”" for item in items), 118, break_on_hyphens=False)


def millions(number: int) -> str:
    """1234567 → 1.2"""
    return f"{number / 1e6:.1f}"


def percent(share: float) -> str:
    """0.914 → 91"""
    return f"{100 * share:.0f}"


def text(facts: dict) -> str:
    """The card for these facts."""
    low, default = facts["match"]["4.0"], facts["match"]["7.5"]
    unseen = facts["vae"].get("psnr_unseen")
    return TEMPLATE.format(
        count=len(facts["names"]),
        size=facts["megabytes"],
        sample_steps=facts["sample_steps"],
        sample_prompts=listed(facts["sample_prompts"]),
        state=UNDERTRAINED if default["top1"] < GOOD_MATCH else "",
        seed=facts["seed"],
        vae_parameters=millions(facts["parameters"]["vae"]),
        unet_parameters=millions(facts["parameters"]["unet"]),
        text_parameters=millions(facts["parameters"]["text_encoder"]),
        vocabulary=facts["vocabulary"],
        machine=facts["machine"],
        total_minutes=round(facts["vae"]["minutes"] + facts["unet"]["minutes"]),
        software=facts["software"],
        vae_budget=facts["vae"]["budget"],
        unet_budget=facts["unet"]["budget"],
        vae_minutes=facts["vae"]["minutes"],
        vae_steps=facts["vae"]["steps"],
        vae_loss=facts["vae"]["loss"],
        unet_minutes=facts["unet"]["minutes"],
        unet_steps=facts["unet"]["steps"],
        unet_loss=facts["unet"]["loss"],
        image_parameters=millions(facts["parameters"]["image_encoder"]),
        clip_budget=facts["clip"]["budget"],
        clip_minutes=facts["clip"]["minutes"],
        clip_steps=facts["clip"]["steps"],
        clip_loss=facts["clip"]["loss"],
        clip_real=percent(facts["clip"]["real"]["top1"]),
        clip_real5=percent(facts["clip"]["real"]["top5"]),
        clip_low=percent(facts["clip"]["drawn"]["4.0"]["top1"]),
        clip_low5=percent(facts["clip"]["drawn"]["4.0"]["top5"]),
        clip_default=percent(facts["clip"]["drawn"]["7.5"]["top1"]),
        clip_default5=percent(facts["clip"]["drawn"]["7.5"]["top5"]),
        layout_from=percent(facts["layout"]["from"]),
        layout_samples=percent(facts["layout"]["samples"]),
        layout_noise=percent(1 - facts["layout"]["noise"]),
        psnr_trained=facts["vae"]["psnr_trained"],
        psnr_unseen=f", {unseen} dB on {facts['held_out']} drawings it never saw" if unseen else "",
        colour_error=facts["vae"]["colour_error"],
        match_steps=facts["match_steps"],
        top1=percent(default["top1"]),
        top5=percent(default["top5"]),
        top1_low=percent(low["top1"]),
        top5_low=percent(low["top5"]),
        chance=f"{100 / len(facts['names']):.1f}",
        prompts=listed(facts["prompts"]),
    )
