"""The text side: a small BPE vocabulary of our own in CLIP's form, and the text encoder."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

from .archives import Icon
from .captions import Captions
from .recipe import Recipe
from .scenes import SceneSource


START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
SAMPLED_CAPTIONS = 5000  # what merges are learnt from, beside the names


def load_tokenizer(icons: Sequence[Icon], recipe: Recipe, folder: Path) -> CLIPTokenizer:
    """The tokenizer that the stages in `folder` share: that of the model being tuned, or else a new one."""
    if recipe.tuned:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return build_tokenizer(icons, recipe)


def build_tokenizer(icons: Sequence[Icon], recipe: Recipe) -> CLIPTokenizer:
    """The tokenizer for the names and captions of `icons`; the same every time."""
    captions, rng = Captions(icons), random.Random(0)
    scenes = SceneSource(icons, recipe, "tokenizer").draw(SAMPLED_CAPTIONS)
    names = [phrase for phrases in captions.phrases.values() for phrase in phrases]
    return train_tokenizer(names + [captions.draw(scene, rng) for scene in scenes], recipe.vocabulary)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], padding: str = "max_length") -> torch.Tensor:
    """Token ids, (texts, 77), padded as the pipeline does it; with `padding="longest"`, no further than needed."""
    return tokenizer(texts, padding=padding, truncation=True, max_length=77, return_tensors="pt").input_ids


def train_tokenizer(captions: list[str], vocabulary: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from `captions`.

    All 256 bytes are in the vocabulary, within a word and at its end, so that any prompt in any script tokenizes.
    """
    backend = Tokenizer.from_str(CLIPTokenizer().backend_tokenizer.to_str())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [symbol + END_OF_WORD for symbol in alphabet]
    room = vocabulary - len(symbols) - 2
    # Bytes at a word's end, numbered beforehand: the trainer would do so in another order each time, and decides by
    # the numbers between pairs that are equally frequent. All stages must have the same tokenizer.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=alphabet,
        special_tokens=symbols[len(alphabet) :],
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]][: max(0, room)]
    tokens = [*dict.fromkeys(symbols + ["".join(pair) for pair in merges]), START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=77
    )


def build_text_config(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """A text encoder's sizes; it knows the special tokens of `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        projection_dim=recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
