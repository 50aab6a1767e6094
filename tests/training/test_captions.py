"""Captions and tokens for training: words that read well and say what is there."""

import json
import random
import re

from toy_drawings import PLAIN, icons_called

from emoji_training.archives import Icon
from emoji_training.captions import Captions, distinct_scenes, with_article
from emoji_training.names import COLOURS, HELD_OUT, NAMES, PHRASES, SYNONYMS
from emoji_training.recipe import FULL, SMALL
from emoji_training.scenes import Background, Scene, SceneSource, Thing
from emoji_training.text import train_tokenizer


def test_captions_read_well() -> None:
    def said(*names: str, style: str = "noto", background: Background = PLAIN, styles: int = 3) -> str:
        words = Captions([Icon(each, name, "", 1, 1) for each in FULL.styles[:styles] for name in names])
        return words.plain(Scene(style, tuple(Thing(0, n, 0.5, 0.5, 0.3, 0.0) for n in names), background))

    white = Background("plain", ("white",), 0.0, 0.1)
    assert said("red-apple", "tiger-face") == "a red apple and a tiger face on a teal background, noto style"
    assert said("octopus", "glasses", "rice-ball", style="3d") == (
        "an octopus, glasses and a rice ball on a teal background, 3d style"
    )
    assert said("red-apple", background=white) == "a red apple on a white background, noto style"
    assert said("red-apple", background=white, styles=1) == "a red apple"
    graded = Background("gradient", ("orange", "light blue"), 0.0, 0.1)
    assert said("bus", background=graded, styles=1) == "a bus on a gradient from orange to light blue"
    checks = Background("checks", ("orange", "black"), 0.0, 0.1)
    assert said("french-fries", background=checks, styles=1).endswith("on an orange and black checkered background")
    for phrase in ("a unicorn", "a pair of eyes", "an hourglass done", "an x ray", "a one piece swimsuit", "a bus"):
        assert with_article(phrase.split(" ", 1)[1]) == phrase
    for phrase in ("maracas", "face with rolling eyes", "glasses"):
        assert with_article(phrase) == (f"a {phrase}" if phrase.startswith("face") else phrase)
    assert not (set(PHRASES) | set(SYNONYMS) | set(COLOURS)) - set(NAMES)
    assert len(set(NAMES)) == len(NAMES) and not set(NAMES) & set(HELD_OUT)
    assert len({phrases[0] for phrases in Captions(icons_called(*NAMES)).phrases.values()}) == len(NAMES)


def test_no_word_means_two_drawings() -> None:
    """ "fish" is what the small model calls its tropical fish; where there is a fish, too, that one has the word."""
    alone = Captions(icons_called("tropical-fish", "cat-face")).phrases
    assert alone["tropical-fish"][0] == "fish" and "cat" in alone["cat-face"]
    both = Captions(icons_called("tropical-fish", "fish", "cat-face", "cat")).phrases
    assert both["tropical-fish"][0] == "tropical fish" and "fish" not in both["tropical-fish"]
    assert both["fish"][0] == "fish" and "cat" not in both["cat-face"]


def test_other_words_are_used_also_where_one_is_the_own_name() -> None:
    """The drawing called "fox" is a fox face, and a fox."""
    words = Captions(icons_called(*NAMES)).phrases
    assert "fox" in SYNONYMS["fox"]
    assert all(set(more) <= set(words[name]) for name, more in SYNONYMS.items())


def test_the_tokenizer_is_the_same_every_time() -> None:
    """Each stage builds its own; all of these pairs of letters are equally frequent."""
    words = ["ab", "ac", "ad", "ae", "af"]
    assert len({json.dumps(train_tokenizer(words, 600).get_vocab(), sort_keys=True) for _ in range(8)}) == 1


def test_no_more_captions_are_waited_for_than_there_are() -> None:
    few = icons_called("red-apple", "frog", "star")
    scenes = distinct_scenes(SceneSource(few, SMALL, "a"), Captions(few), 128)
    assert set(scenes) == {"a red apple", "a frog face", "a star"}
    assert all(Captions(few).plain(scene) == words for words, scene in scenes.items())
    assert len(distinct_scenes(SceneSource(few, SMALL, "a"), Captions(few), 2)) == 2


def test_places_are_said_as_they_are() -> None:
    rng, heard, words_for = random.Random(0), set(), Captions(icons_called("red-apple", "frog"))
    things = (Thing(0, "red-apple", 0.3, 0.5, 0.3, 0.0), Thing(0, "frog", 0.7, 0.5, 0.3, 0.0))
    turned = tuple(Thing(0, thing.name, thing.y, thing.x, 0.3, 0.0) for thing in things)
    for both in (things, turned):
        for _ in range(200):
            words = words_for.draw(Scene("noto", both, PLAIN), rng)
            assert "apple" in words and "frog" in words
            for relation, right in (
                ("to the left of", both is things and words.index("apple") < words.index("frog")),
                ("to the right of", both is things and words.index("frog") < words.index("apple")),
                ("above", both is turned and words.index("apple") < words.index("frog")),
                ("below", both is turned and words.index("frog") < words.index("apple")),
            ):
                if relation in words:
                    heard.add(relation)
                    assert right, words
    assert len(heard) == 4


def test_what_is_left_unsaid_is_mostly_white_and_noto(icons: list[Icon]) -> None:
    rng, captions = random.Random(0), Captions(icons)
    scenes = SceneSource(icons, FULL, "a").draw(6000)
    bare = [scene for scene in scenes if not re.search("style|, (noto|flat|3d)| on ", captions.draw(scene, rng))]
    assert len(bare) > 100
    plain = [scene for scene in bare if scene.style == "noto" and scene.background.colours == ("white",)]
    assert len(plain) > 0.5 * len(bare)


def test_every_prompt_tokenizes() -> None:
    tokenizer = train_tokenizer(["a red apple", "an emoji of a red apple"], FULL.vocabulary)
    for prompt in ("a red apple", "", "ünïcödé 漢字 🍎", "x" * 300, "a\tb\nc  1234!?"):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids
        assert len(tokens) == 77 and tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
        assert max(tokens) < len(tokenizer)
        inner = tokenizer(prompt).input_ids[1:-1]
        assert tokenizer.unk_token_id not in inner, "no byte is unknown"
