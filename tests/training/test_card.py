"""The model card that ships: every number and prompt in it is one of the run's."""

import json
from pathlib import Path

import toy_drawings  # noqa: F401 (finds the training code)

import agentsd
from emoji_training import card


MODEL = Path(agentsd.__file__).parent / "assets" / "emoji"


def test_the_card_is_made_of_the_facts() -> None:
    facts = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    assert (MODEL / "README.md").read_text(encoding="utf-8") == card.text(facts)


def test_the_images_of_the_card_are_there() -> None:
    assert {"samples.png", "loss.png"} <= {file.name for file in MODEL.iterdir()}
