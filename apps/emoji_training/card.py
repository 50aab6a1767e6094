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

A small Stable Diffusion model trained on {drawings} emoji drawings, {size} MB in all. It exists so that `agentsd` can
be tried and tested on a real text-to-image model without downloading gigabytes. It is not a general image
generator: it was only shown {scenes}.
{state}
```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("agentsd/assets/emoji")  # or dtype=torch.float16
prompt = "{example}"
pipe(prompt, num_inference_steps=20, guidance_scale={guidance:g}).images[0].save("emoji.png")
```

A guidance scale of about {guidance:g} gives cleaner images than the pipeline's default of 7.5; all images and
numbers below use {guidance:g}.

![Samples](samples.png)

Not cherry-picked: {sample_steps} DDIM steps, seeds counting up from {seed}. Prompts, row by row, eight per row:
{sample_prompts}.{sample_sizes}

## What is inside

| part | parameters | |
| --- | ---: | --- |
| `AutoencoderKL` | {vae_parameters} M | factor 8, 4 latent channels, latents standardised per channel |
| `UNet2DConditionModel` | {unet_parameters} M | self- and cross-attention at {levels} |
| `CLIPTextModel` | {text_parameters} M | its own BPE vocabulary of {vocabulary} tokens |
| `DDIMScheduler` | | v-prediction, noise schedule that ends in pure noise, trailing steps |
| `CLIPModel` in `clip/` | {image_parameters} M for images | not part of the pipeline: judges images, see below |

Images are {sides}. The weights are float16 safetensors; they load and run in float32 and in float16. Any
prompt tokenizes. There is no safety checker: the model has only ever seen the drawings below.

## Data

{sources}

{composition}

## Recipe

{how}:

```
{commands}
```

| stage | time on {machine} | steps | final loss |
| --- | ---: | ---: | ---: |
| VAE | {vae_minutes} of {vae_budget} min | {vae_steps} | {vae_loss} |
| text and image encoder | {clip_minutes} of {clip_budget} min | {clip_steps} | {clip_loss} |
{unet_rows}

- VAE: L1 + 0.5 L1 of the gradients + L1 of 4-pixel colour averages, colour differences weighing most, + a small KL.
  At first, three latent channels are pulled towards the colours of 8×8-pixel blocks, so that hue is not learnt last.
  Training starts on crops and goes on with whole images, also mirrored and with colour channels swapped.
- Text and image encoder: CLIP's contrastive loss, on scenes, some of them passed through the VAE, with some blur and
  noise. The image encoder is a vision transformer.
- UNet: v-prediction on the VAE's latents of newly composed scenes, for the first {coarse} % of the time at half the
  side length and in batches four times as large; 10 % of the captions dropped for classifier-free guidance, averaged
  weights (EMA). Its text encoder starts as the one above and is trained further along with it. All noise levels are
  equally likely for the first {layout_from} % of the time; then {layout_samples} % of the samples come from the
  noisiest {layout_noise} % of the range, which decides what is drawn where.
{tuning}- All: AdamW, cosine learning rate over the time budget, {autocast}, seed {seed}. {software}.
  Because the learning rate follows the clock, a second run gives a similar model, not the same weights.

![Loss](loss.png)

## Measured

Measured by the export stage of the command above, on {count} newly composed scenes. FID and KID use the features of
the image encoder in `clip/`, and compare with {references} other renders (`clip/reference.safetensors`). "Own caption"
says how often the encoder finds an image's caption nearest among all {count}, or among the five nearest; by chance it
would be {chance} % and {chance5} %. Background and style alone tell many captions apart, so the second row is for
renders in which each drawing is not the one that the caption names, with everything else unchanged.

| images | own caption nearest | among five | CLIP score | FID | KID |
| --- | ---: | ---: | ---: | ---: | ---: |
{judged}

Images are drawn {precision}. KID can be negative: it has no bias, and scenes that all differ, as
these do, are more varied than random ones, among which some drawings come up again.

VAE reconstruction: {psnr} dB PSNR on these scenes{psnr_unseen};
the mean colour of an 8×8-pixel block is off by {colour_error} of 255 levels.

The encoder has seen renders of these drawings and nothing else: its figures say something about images of this
model and nothing about others, and they cannot be compared with FID or CLIP scores from other encoders.

## What it cannot do

- Anything that is not among its drawings: other words give one of the known drawings, or a blend of several.
- {limits}
- Things in colours other than those it saw: it never learnt "a purple apple".
- Sizes other than {sides_known}: they run, but the images fall apart the further one goes.
- Stand in for diverse images: what a method does to these drawings is weak evidence of what it does to photographs.
{known}"""

# Where they are few and each can be named: what may be asked for.
KNOWN = """
## The prompts it knows

{prompts}.
"""
MOST_LISTED = 200

ONE_COMMAND = """\
One command does it all, from fetching the drawings to writing this card; with `--stage` and `--resume` it can also
run in parts"""

# Said of a model that was trained at one size and then tuned for two.
TWO_COMMANDS = """\
Two commands do it all, from fetching the drawings to writing this card. The first trains a model for {half}
pixels, the second tunes its UNet and text encoder for both sizes; with `--stage` and `--resume` they can also run
in parts"""
TUNING = """\
- Tuning: from the weights of the row above on, each step sees {batch} images of {side} pixels and
{half_batch} of {half}; the VAE stays. {layout_samples} % of them come from the noisiest {layout_noise} % of the
range at {side} pixels and from the noisiest {half_layout_noise} % at {half}: where an image has four times the
pixels, the same noise hides less of it. The learning rate stays at its peak for the first {hold} % of the time.
"""

# Said when fewer images than this find their own caption among the nearest five, as a part of what renders do.
UNDERTRAINED = """
**This checkpoint is under-trained.** Its images often do not show what was asked for. It serves to run and time the
code, not to judge image quality.
"""
GOOD_MATCH = 0.5

WRAPPER = textwrap.TextWrapper(116, break_on_hyphens=False, break_long_words=False)

SOURCES = {
    "noto": "[Noto Emoji](https://github.com/googlefonts/noto-emoji) (Copyright Google, Apache License 2.0), in the "
    "SVG form of the npm package `@iconify-json/noto`",
    "flat": "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji), flat (Copyright Microsoft Corporation, MIT "
    "License), in the SVG form of the npm package `@iconify-json/fluent-emoji-flat`",
    "3d": "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji), with shading (Copyright Microsoft "
    "Corporation, MIT License), in the SVG form of the npm package `@iconify-json/fluent-emoji`",
}


def text(facts: dict) -> str:
    """The card for these facts."""
    judged = facts["judged"]
    sides = f"{facts['image_size']}×{facts['image_size']}"
    known, tables, first = sides, {"": judged}, facts.get("before")
    if first:
        half = facts["half"]
        smaller = f"{half['image_size']}×{half['image_size']}"
        sides, known = f"{sides} or {smaller}", f"{sides} and {smaller}"
        tables = {f", {facts['image_size']} pixels": judged, f", {half['image_size']} pixels": half["judged"]}
    worst = min(row["top5"] for table in tables.values() for steps, row in table.items() if steps.isdigit())
    single, plain = facts["most_drawings"] == 1, facts["backgrounds"] == ["white"]
    unseen = facts["vae"].get("psnr_unseen")
    composition = (
        "one drawing, slightly moved and shrunk, on white"
        if single and plain
        else f"one to {facts['most_drawings']} drawings of one style at varying place, size and turn, on a plain, "
        "graded or patterned background"
    )
    parameters = {name: f"{number / 1e6:.1f}" for name, number in facts["parameters"].items()}
    stages = {
        f"{stage}_{name}": facts[stage][name]
        for stage in ("vae", "clip")
        for name in ("minutes", "budget", "steps", "loss")
    }
    precision = facts.get("precision", "bfloat16")
    begun = first or facts  # the recipe that the UNet was begun by
    elsewhere = "" if begun["machine"] == facts["machine"] else f", on {facts['machine']}"
    return TEMPLATE.format(
        **stages,
        drawings=f"{sum(facts['styles'].values()):,}",
        scenes="one of them at a time, on white"
        if single and plain
        else "scenes of a few of them, as described below",
        size=facts["megabytes"],
        state=UNDERTRAINED if worst < GOOD_MATCH * judged["renders"]["top5"] else "",
        example="a red apple" if len(facts["styles"]) == 1 else "a red apple on a teal background, noto style",
        guidance=facts["guidance"],
        sample_steps=facts["sample_steps"],
        sample_prompts=listed(facts["sample_prompts"]),
        seed=facts["seed"],
        how=TWO_COMMANDS.format(half=half["image_size"]) if first else ONE_COMMAND,
        commands="\n".join(
            f"python apps/train_emoji.py --recipe {recipe} --stage all"
            for recipe in ([first["recipe"]] if first else []) + [facts["recipe"]]
        ),
        unet_rows="\n".join(
            unet_row(*row)
            for row in (
                [("UNet and text encoder", first), (f"the same, tuned for {known}{elsewhere}", facts["unet"])]
                if first
                else [("UNet and text encoder", facts["unet"])]
            )
        ),
        tuning=tuning(facts) if first else "",
        sample_sizes=f"\nFirst at {facts['image_size']} pixels, then all of them again at {half['image_size']}."
        if first
        else "",
        vae_parameters=parameters["vae"],
        unet_parameters=parameters["unet"],
        text_parameters=parameters["text_encoder"],
        image_parameters=parameters["image_encoder"],
        levels=", ".join(f"{side}×{side}" for side in facts["levels"]) + " latent pixels",
        vocabulary=facts["vocabulary"],
        sides=sides,
        sides_known=known,
        sources="\n".join(
            WRAPPER.fill(f"- {style}: {count:,} drawings of {SOURCES[style]}.").replace("\n", "\n  ")
            for style, count in facts["styles"].items()
        ),
        composition=WRAPPER.fill(
            f"Each image is {composition}. Its caption is made along with it, in plain words that vary in choice "
            "and order. The drawings themselves are not part of this package; their names are in `training.json`."
        ),
        machine=begun["machine"],
        software=facts["software"],
        autocast="bf16 autocast where faster" if first else "bf16 autocast",
        precision="in float32" if precision == "float32" else f"under {precision} autocast",
        coarse=percent(begun["coarse_until"]),
        layout_from=percent(begun["layout"]["from"]),
        layout_samples=percent(begun["layout"]["samples"]),
        layout_noise=percent(1 - begun["layout"]["noise"]),
        count=f"{facts['judged_scenes']:,}",
        references=f"{facts['reference_scenes']:,}",
        chance=f"{100 / facts['judged_scenes']:.1f}",
        chance5=f"{500 / facts['judged_scenes']:.1f}",
        judged="\n".join(row for size, table in tables.items() for row in judged_rows(table, size)),
        psnr=facts["vae"]["psnr"],
        psnr_unseen=f", {unseen} dB on scenes of {facts['held_out']} drawings it never saw" if unseen else "",
        colour_error=facts["vae"]["colour_error"],
        known=KNOWN.format(prompts=listed(sorted(facts["prompts"], key=without_article)))
        if single and plain and len(facts["names"]) <= MOST_LISTED
        else "",
        limits="Scenes, several objects, counting, backgrounds, styles, text. "
        '"A red apple and a cat" is not two things to it.'
        if single
        else f"More than {facts['most_drawings']} things, the same thing more than once, relations other than beside "
        "and above, text.",
    )


def tuning(facts: dict) -> str:
    """What tuning did, for the list of the stages."""
    words = TUNING.format(
        side=facts["image_size"],
        half=facts["half"]["image_size"],
        batch=facts["batch"],
        half_batch=facts["half"]["batch"],
        layout_samples=percent(facts["layout"]["samples"]),
        layout_noise=percent(1 - facts["layout"]["noise"]),
        half_layout_noise=percent(1 - facts["half"]["layout_noise"]),
        hold=percent(facts["hold_until"]),
    )
    return WRAPPER.fill(words.replace("\n", " ")).replace("\n", "\n  ") + "\n"


def unet_row(label: str, stage: dict) -> str:
    """A row of the table of stages."""
    return f"| {label} | {stage['minutes']} of {stage['budget']} min | {stage['steps']} | {stage['loss']} |"


def judged_rows(table: dict[str, dict[str, float]], size: str) -> list[str]:
    """Rows for renders and for what was drawn, at one size."""
    return [
        judged_row(f"fresh renders{size}", table["renders"]),
        judged_row(f"the same with other drawings{size}", table["mistaken"]),
        *(judged_row(f"drawn in {steps} steps{size}", row) for steps, row in table.items() if steps.isdigit()),
    ]


def judged_row(label: str, row: dict[str, float]) -> str:
    """A row of the table of measured values."""
    found = f"{percent(row['top1'])} % | {percent(row['top5'])} %"
    return f"| {label} | {found} | {row['clip']} | {row['fid']} | {row['kid']} |"


def listed(items: list[str]) -> str:
    """Quoted, comma-separated, wrapped."""
    return WRAPPER.fill(", ".join(f"“{item}”" for item in items))


def without_article(phrase: str) -> str:
    """What to sort a prompt by."""
    return phrase.removeprefix("a ").removeprefix("an ")


def percent(share: float) -> str:
    """0.914 → 91"""
    return f"{100 * share:.0f}"
