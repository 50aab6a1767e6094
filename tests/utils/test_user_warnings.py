"""Warnings of libraries that concern the user come through, once and in plain words; the others do not."""

import logging
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from models import tiny_sd, tiny_sdxl

import agentsd
from agentsd.utils.generation import draw
from agentsd.utils.user_warnings import plain_warning, plain_words, user_warnings


LONG = " ".join(["apple"] * 30)  # of the tests' tokenizer, which spells, 150 tokens


def said_of(pipe, **call):
    return draw(pipe, {"prompt": "red", **call}, 1, torch.Generator().manual_seed(0)).said


def test_a_prompt_whose_end_is_left_out():
    """And what of it: 75 letters are read beside the two tokens around them."""
    (warning,) = said_of(tiny_sd(), prompt=LONG)
    assert warning.startswith('The prompt is longer than the 77 tokens that the model reads. This end was left out: "')
    assert warning.count("apple") == 15


def test_two_text_encoders_say_it_once():
    assert len(said_of(tiny_sdxl(), prompt=LONG)) == 1


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_a_negative_prompt_whose_end_is_left_out(build):
    """diffusers itself is silent about it."""
    (warning,) = said_of(build(), negative_prompt=LONG)
    assert warning.startswith("The negative prompt is longer than the 77 tokens")
    assert warning.count("apple") == 15
    assert said_of(build(), negative_prompt="blue") == []


def test_nothing_is_said_of_what_is_fine():
    assert said_of(tiny_sd(), prompt="a red apple", negative_prompt="blue") == []


def test_what_was_said_is_not_said_again():
    said, pipe = [], tiny_sd()
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        for _ in range(2):
            agentsd.apply_patch(pipe, reuse=2)
            draw(pipe, {"prompt": LONG}, 2, torch.Generator(), said=said)
    assert [text.split(" ")[0] for text in sorted(said)] == ["Feature", "The"]
    assert sum("Feature reuse" in str(warning.message) for warning in issued) == 1


def test_a_thread_hears_only_its_own():
    with user_warnings() as said:
        thread = threading.Thread(target=logging.getLogger("diffusers").warning, args=["not mine"])
        thread.start()
        thread.join()
        logging.getLogger("diffusers.pipelines").warning("mine")
    assert said == ["mine"]


def test_listening_leaves_nothing_behind():
    before = warnings.showwarning, [list(logging.getLogger(name).handlers) for name in ("diffusers", "transformers")]
    with pytest.raises(RuntimeError), user_warnings():
        raise RuntimeError
    handlers = [list(logging.getLogger(name).handlers) for name in ("diffusers", "transformers")]
    assert (warnings.showwarning, handlers) == before


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "The following part of your input was truncated because CLIP can only handle sequences up to 77 tokens: "
            "['one end', 'another']",
            'left out: "one end … another"',
        ),
        (
            "The following part of your input was truncated because `max_sequence_length` is set to  256 tokens: "
            "['the end']",
            'the 256 tokens that the model reads. This end was left out: "the end"',
        ),
        (
            "The config attributes {'frob': 1} were passed to DDIMScheduler, but are not expected and will be ignored."
            " Please verify your scheduler_config.json configuration file.",
            "{'frob': 1} were passed to DDIMScheduler, but are not expected and will be ignored",
        ),
        (
            'The configuration file of this scheduler: PNDMScheduler {\n  "beta_end": 0.1\n}\n is outdated. '
            "`steps_offset` should be set to 1 instead of 0. Please make sure to update",
            "The scheduler's configuration is outdated: `steps_offset` was set to 1.",
        ),
        ("Some weights of UNet2DConditionModel were not initialized from the", "Weights of UNet2DConditionModel are"),
        ("Guidance scale 7.5 is ignored for step-wise distilled models.", "Guidance scale 7.5 is ignored"),
        ("No LoRA keys associated to UNet2DConditionModel found with the prefix='unet'.", "No LoRA keys associated"),
        ("`height` and `width` have to be divisible by 16. They will be resized.", "divisible by 16"),
    ],
)
def test_what_concerns_the_user_is_in_plain_words(message, words):
    found = plain_words(message, is_trusted=True)
    assert words in found and "\n" not in found and len(found) < 400


@pytest.mark.parametrize(
    "message",
    [
        "You have disabled the safety checker for <class 'StableDiffusionPipeline'> by passing `safety_checker=None`.",
        "Pipelines loaded with `dtype=torch.float16` cannot run with `cpu` device.",
        "The StableDiffusionLDM3DPipeline has been deprecated and will not receive bug fixes or feature updates",
    ],
)
def test_noise_is_left_out(message):
    assert plain_words(message, is_trusted=True) is None


def test_unknown_words_count_only_from_who_is_trusted():
    assert plain_words("Token indices sequence length is longer than", is_trusted=False) is None
    with user_warnings() as said:
        logging.getLogger("transformers.tokenization").warning("Token indices sequence length is longer than")
    assert said == []


def test_of_python_s_warnings_those_of_agentsd_count():
    inside = agentsd.__file__
    assert plain_warning("mine", UserWarning, inside) == "mine"
    assert plain_warning("theirs", UserWarning, "/somewhere/torch/nn/modules/module.py") is None
    assert plain_warning("old", FutureWarning, "/somewhere/diffusers/utils/deprecation_utils.py") is None
    assert plain_warning("aspect ratio", UserWarning, "/somewhere/diffusers/image_processor.py") == "aspect ratio"


def test_quiet_libraries_still_tell():
    """As in the command: nothing of theirs is printed, and what matters is heard all the same, in each generation."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from agentsd.utils.libraries import quiet_libraries
quiet_libraries()
import warnings, torch
from models import tiny_sd
from agentsd.utils.generation import draw
pipe = tiny_sd()
for _ in range(2):
    print(len(draw(pipe, {{"prompt": {LONG!r}}}, 1, torch.Generator()).said))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("1\n1\n", "")
