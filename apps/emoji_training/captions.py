"""Scenes in plain words."""

import random
from collections.abc import Sequence

from .archives import Icon
from .names import COLOURS, NO_ARTICLE, PHRASES, SYNONYMS
from .scenes import Background, Scene, SceneSource


# Endings in "s" that are no plurals.
SINGULAR = ("ss", "us", "is", "lens", "rhinoceros")


class Captions:
    """
    Says scenes in words.

    Args:
        icons (`Sequence[Icon]`): All drawings there are: another word for one must not be the name of another one.
    """

    def __init__(self, icons: Sequence[Icon]):
        self.styles = len({icon.style for icon in icons})
        spelt = {icon.name: spell(icon.name) for icon in sorted(icons, key=lambda icon: icon.name)}
        names = set(spelt.values())
        self.phrases: dict[str, list[str]] = {}
        for name, plain in spelt.items():
            phrase = PHRASES.get(name, plain)
            phrase = plain if phrase in names else phrase
            synonyms = [synonym for synonym in SYNONYMS.get(name, ()) if synonym not in names - {plain}]
            coloured = [f"{COLOURS[name]} {phrase}"] if name in COLOURS else []
            self.phrases[name] = [phrase] * 4 + synonyms + coloured  # likelier ones are in it more than once

    def plain(self, scene: Scene) -> str:
        """The one full caption of a scene: "a red apple and a tiger face on a teal background, noto style".

        With one style to choose from there is none to name; nor is white, where nothing else is drawn on.
        """
        things = listed([with_article(self.phrases[thing.name][0]) for thing in scene.things])
        if self.styles == 1:
            return things if is_white(scene.background) else f"{things} on {describe(scene.background)}"
        return f"{things} on {describe(scene.background)}, {scene.style} style"

    def draw(self, scene: Scene, rng: random.Random) -> str:
        """A random caption: words, order and how much is said differ.

        What is left unsaid is mostly white and noto, so that a prompt of a name alone has a plain meaning.
        """
        phrases = [rng.choice(self.phrases[thing.name]) for thing in scene.things]
        if len(phrases) == 1 and rng.random() < 0.25:
            things = rng.choice([phrases[0], f"{phrases[0]} emoji"])
        else:
            things = said_together(scene, phrases, rng)
            things = rng.choice(["", "", "", "a drawing of ", "an emoji of ", "an image of "]) + things
        unsaid = (0.9 if self.styles == 1 else 0.6) if is_white(scene.background) else 0.05
        where = "" if rng.random() < unsaid else f" on {describe(scene.background)}"
        if self.styles == 1 or rng.random() < (0.4 if scene.style == "noto" else 0.05):
            return things + where
        return rng.choice(
            [
                f"{things}{where}, {scene.style} style",
                f"{things}{where}, {scene.style}",
                f"{things}, {scene.style} style{where and ','}{where}",
                f"{scene.style} style, {things}{where}",
                f"{things}{where} in {scene.style} style",
            ]
        )


def distinct_scenes(source: SceneSource, captions: Captions, count: int) -> dict[str, Scene]:
    """Random scenes by their full captions, no two of one caption; fewer than `count` where there are no more."""
    scenes: dict[str, Scene] = {}
    before = -1
    while before < len(scenes) < count:
        before = len(scenes)
        for scene in source.draw(count):
            scenes.setdefault(captions.plain(scene), scene)
    return dict(list(scenes.items())[:count])


def spell(name: str) -> str:
    """The plain words of a drawing's name: "red-apple" → "red apple"."""
    return name.replace("-", " ").replace("t shirt", "t-shirt")


def with_article(phrase: str) -> str:
    """Say "an apple" for "apple"; plurals and substances stay as they are."""
    head = phrase.split(" with ")[0].split(" of ")[0].split(" in ")[0]
    if phrase in NO_ARTICLE or (head.endswith("s") and not head.endswith(SINGULAR)):
        return phrase
    vowel = phrase.startswith(("hour", "x ")) or (
        phrase[0] in "aeiou" and not phrase.startswith(("uni", "euro", "ewe", "one "))
    )
    return f"{'an' if vowel else 'a'} {phrase}"


def describe(background: Background) -> str:
    """A background in words: "a teal background", "a gradient from teal to white"."""
    first, last = background.colours[0], background.colours[-1]
    return {
        "plain": f"a {first} background",
        "gradient": f"a gradient from {first} to {last}",
        "stripes": f"{first} and {last} stripes",
        "dots": f"a {first} background with {last} dots",
        "checks": f"a {first} and {last} checkered background",
    }[background.pattern].replace("a orange", "an orange")


def said_together(scene: Scene, phrases: list[str], rng: random.Random) -> str:
    """The drawings of a scene in one phrase, in random order; two of them sometimes with where they are."""
    order = rng.sample(range(len(phrases)), len(phrases))
    words = [with_article(phrases[number]) for number in order]
    if len(words) == 2 and rng.random() < 0.5:
        first, second = (scene.things[number] for number in order)
        beside, below = second.x - first.x, second.y - first.y
        if abs(beside) > 2 * abs(below):
            return f"{words[0]} to the {'left' if beside > 0 else 'right'} of {words[1]}"
        if abs(below) > 2 * abs(beside):
            return f"{words[0]} {'above' if below > 0 else 'below'} {words[1]}"
        return f"{words[0]} next to {words[1]}"
    return listed(words)


def listed(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def is_white(background: Background) -> bool:
    """Whether there is nothing behind the drawings."""
    return background.colours == ("white",)
