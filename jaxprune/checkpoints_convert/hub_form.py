"""A model in its publisher's form -> the form that `transformers` knows.

What the publishers leave to their code is written down: a token that stands for an image, the files
of the processor, the chat template. Where the tokenizer has no such token, "<image>" and "<pad>"
are appended to it and the vocabulary is padded to a multiple of 64, in the way of the LLaVAs on
the Hub (llava-hf/llava-1.5-7b-hf).
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, normalizers

from jaxprune.checkpoints_convert.plan import PlannedTensor
from jaxprune.errors import UserError
from jaxprune.inputs.processor import Processor, load_processor
from jaxprune.inputs.prompts import tokenize
from jaxprune.models.family import IMAGE_PLACEHOLDER, ModelConfig
from jaxprune.models.llava.prompts import VICUNA_SYSTEM
from jaxprune.models.registry import family_of

PAD_TOKEN = "<pad>"
VOCABULARY_MULTIPLE = 64
VOCABULARY_PATHS = ("language_model/embed_tokens/embedding", "language_model/lm_head/kernel")


@dataclasses.dataclass(frozen=True)
class HubForm:
    """What stands around the weights in a Hugging Face directory.

    Attributes:
        config: the model's config.
        token_ids: the special tokens' ids, as config.json has them.
        files: the other files' contents by name: tokenizer, processor, chat template.
        rows: of the embedding and the head, where they need others than they have; see
            `with_new_rows`.
    """

    config: ModelConfig
    token_ids: dict[str, Any]
    files: dict[str, bytes]
    rows: int | None = None


def hub_form(
    directory: pathlib.Path, config: ModelConfig, *, tokenizer: pathlib.Path | None = None
) -> HubForm:
    """The Hugging Face form of a model in its publisher's form.

    Args:
        directory: where its config.json and tokenizer are.
        config: its config.
        tokenizer: where the tokenizer is, if elsewhere.

    Raises:
        UserError: for a tokenizer that is missing, or that splits a prompt around the image
            token otherwise than around an image.
    """
    family = family_of(config)
    original = load_processor(directory, config, tokenizer=tokenizer)
    known, image, pad = _with_tokens(original, family.prompts.image_token)
    vocabulary = known.get_vocab()
    text: Any = config.text_config
    rows = max(text.vocab_size, vocabulary[image] + 1, vocabulary[pad] + 1)
    if rows > text.vocab_size:
        rows += -rows % VOCABULARY_MULTIPLE
    changed = {
        "image_token_index": vocabulary[image],
        "text_config": dataclasses.replace(text, vocab_size=rows),
    }
    wider = dataclasses.replace(config, **changed)  # type: ignore[type-var]
    eos = original.eos_token_ids
    token_ids = {
        "bos_token_id": original.tokenizer.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": vocabulary[pad],
    }
    fields: dict[str, dict[str, Any]] = {
        "generation_config.json": token_ids,
        "tokenizer_config.json": {
            # The class that takes tokenizer.json as it is, without rebuilding it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": original.tokenizer.bos_token,
            "eos_token": original.tokenizer.eos_token,
            "unk_token": original.tokenizer.unk_token,
            "pad_token": pad,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": text.max_position_embeddings,
        },
    }
    do_pad = bool(getattr(original.image_processor, "do_pad", False))
    for name, own in family.processor_files(wider, do_pad=do_pad).items():
        fields[name] = {**fields.get(name, {}), **own}
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in fields.items()}
    texts["tokenizer.json"] = known.to_str()
    assert original.template.text is not None  # the family's own
    template = original.template.text.replace(IMAGE_PLACEHOLDER, image)
    texts["chat_template.jinja"] = template
    contents = {name: text.encode() for name, text in texts.items()}
    return HubForm(wider, token_ids, contents, rows)


def _with_tokens(original: Processor, image_token: str) -> tuple[Tokenizer, str, str]:
    """The tokenizer, its token for images, and its token for padding."""
    if image_token not in original.tokenizer.get_vocab():
        return _with_image_token(original), IMAGE_PLACEHOLDER, PAD_TOKEN
    plain = Tokenizer.from_str(original.tokenizer.backend_tokenizer.to_str())
    pad = original.tokenizer.pad_token or original.tokenizer.eos_token
    return plain, image_token, pad


def with_new_rows(path: str, array: np.ndarray, rows: int | None) -> np.ndarray:
    """The embedding or head with rows for new ids; any other parameter unchanged.

    The new rows are the mean of the old ones. A new id's logit is then the mean of the old
    logits: it is not above their maximum, so greedy answers stay the same, and as exp is
    convex, k new ids among n old ones have at most k / (n + k) of the probability when
    drawing at any temperature, 0.2 % for LLaVA-1.5.

    Args:
        path: the parameter's path.
        array: in PyTorch's layout, `[V, H]` for embedding and head.
        rows: the new V; None for the old one.
    """
    if path not in VOCABULARY_PATHS or rows is None or len(array) == rows:
        return array
    wider = np.empty((rows, *array.shape[1:]), array.dtype)
    wider[: len(array)] = array
    wider[len(array) :] = wider[: len(array)].mean(axis=0, dtype=np.float64).astype(array.dtype)
    return wider


def widen(plan: list[PlannedTensor], rows: int | None) -> list[PlannedTensor]:
    """A plan whose embedding and head are read with `rows` rows; see `with_new_rows`."""
    return [_widened(tensor, rows) for tensor in plan]


def _widened(tensor: PlannedTensor, rows: int | None) -> PlannedTensor:
    path = tensor.rule.paths[0]
    if path not in VOCABULARY_PATHS or rows is None:
        return tensor
    stored = dataclasses.replace(
        tensor.stored,
        shape=(rows, *tensor.stored.shape[1:]),
        read=lambda: with_new_rows(path, tensor.stored.read(), rows),
    )
    return dataclasses.replace(tensor, stored=stored)


def _with_image_token(original: Processor) -> Tokenizer:
    """The tokenizer with "<image>" and "<pad>", giving the ids that it gave around images.

    Raises:
        UserError: when there is no such tokenizer.
    """
    text = original.tokenizer.backend_tokenizer.to_str()
    plain = Tokenizer.from_str(text)
    plain.add_special_tokens([IMAGE_PLACEHOLDER, PAD_TOKEN])
    if _agrees(plain, original):
        return plain
    # Text after an image was tokenised alone, with a space put in front of it. A tokenizer
    # that does so at the start of a whole prompt only has to be given the space. `normalized`
    # tokens are looked for once the space is there, "</s>" before.
    spaced = Tokenizer.from_str(text)
    space = normalizers.Replace(
        Regex(rf"{IMAGE_PLACEHOLDER}(?! |{IMAGE_PLACEHOLDER}|\z)"), IMAGE_PLACEHOLDER + " "
    )
    before = [spaced.normalizer] if spaced.normalizer else []
    spaced.normalizer = normalizers.Sequence([space, *before])
    image = AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=True)
    spaced.add_special_tokens([image, PAD_TOKEN])
    if _agrees(spaced, original):
        return spaced
    raise UserError(
        f"The tokenizer of {original.directory} cannot be given an image token: it would split "
        "the text around one otherwise than the original format does. Load the model directly."
    )


def _agrees(tokenizer: Tokenizer, original: Processor) -> bool:
    """Whether prompts with images, of one turn and of several, keep their ids."""
    end = original.tokenizer.eos_token or ""
    image = tokenizer.token_to_id(IMAGE_PLACEHOLDER)
    prompts = (
        f"{VICUNA_SYSTEM} USER: <image>\nWhat is it? ASSISTANT:",
        f"USER: <image>\n<image>\nWho? ASSISTANT: I.{end}USER: Why? ASSISTANT:",
        "<image>What <image><image> is it",
    )
    for prompt in prompts:
        first, *others = tokenize(original, prompt, prompt.count(IMAGE_PLACEHOLDER))
        expected = first + [token for piece in others for token in (image, *piece)]
        if tokenizer.encode(prompt).ids != expected:
            return False
    return True
