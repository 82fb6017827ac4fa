"""LLaVA's original format, of before `transformers` had the model, and what it lacks there.

A LLaMA's config.json with `mm_*` fields, the vision tower in a directory of its own, no token
that stands for an image, no files for the processor. `hub_form` makes up for all of it in the
way of the checkpoints on the Hub (llava-hf/llava-1.5-7b-hf): "<image>" and "<pad>" are appended
to the tokenizer, and the vocabulary is padded to a multiple of 64.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, normalizers

from jaxprune.checkpoints_convert.plan import PlannedTensor
from jaxprune.errors import UserError
from jaxprune.files import read_json
from jaxprune.inputs.processor import Processor, load_processor
from jaxprune.inputs.prompts import tokenize
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.config import require
from jaxprune.models.family import IMAGE_PLACEHOLDER, ModelConfig
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.models.llava.prompts import VICUNA_SYSTEM
from jaxprune.models.llava_next.config import LlavaNextConfig, pinpoints
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


def hub_form(directory: pathlib.Path, config: LlavaConfig) -> HubForm:
    """The Hugging Face form of an original-format model.

    Args:
        directory: where its config.json and tokenizer are.
        config: its config, as `original_config` reads it.

    Raises:
        UserError: for a tokenizer that is missing, or that splits a prompt around the image
            token otherwise than around an image.
    """
    original = load_processor(directory, family_of(config), original=config)
    tokenizer = _with_image_token(original)
    vocabulary = tokenizer.get_vocab()
    image, pad = vocabulary[IMAGE_PLACEHOLDER], vocabulary[PAD_TOKEN]
    rows = max(config.text_config.vocab_size, image + 1, pad + 1)
    rows += -rows % VOCABULARY_MULTIPLE
    wider = dataclasses.replace(
        config,
        image_token_index=image,
        text_config=dataclasses.replace(config.text_config, vocab_size=rows),
    )
    eos = original.eos_token_ids
    token_ids = {
        "bos_token_id": original.tokenizer.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": pad,
    }
    fields = {
        "generation_config.json": token_ids,
        "tokenizer_config.json": {
            # The class that takes tokenizer.json as it is, without rebuilding it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": original.tokenizer.bos_token,
            "eos_token": original.tokenizer.eos_token,
            "unk_token": original.tokenizer.unk_token,
            "pad_token": PAD_TOKEN,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.text_config.max_position_embeddings,
        },
        **family_of(config).processor_files(wider, do_pad=original.image_processor.do_pad),
    }
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in fields.items()}
    texts["tokenizer.json"] = tokenizer.to_str()
    assert original.template.text is not None  # the family's own
    texts["chat_template.jinja"] = original.template.text
    contents = {name: text.encode() for name, text in texts.items()}
    return HubForm(wider, token_ids, contents, rows)


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


def is_original(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of LLaVA's original format: a LLaMA with `mm_*` fields."""
    return "mm_vision_tower" in fields and "text_config" not in fields


# Settings of the original code base that say how it was trained, or choose among code
# paths that all give LLaVA-1.5's forward pass.
_INERT = {
    "freeze_mm_mlp_adapter",
    "freeze_mm_vision_resampler",
    "image_aspect_ratio",
    "image_crop_resolution",
    "image_grid_pinpoints",
    "image_split_resolution",
    "mm_hidden_size",
    "mm_patch_merge_type",
    "mm_vision_tower",
    "mm_vision_tower_lr",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler",
    "unfreeze_mm_vision_tower",
    "mm_projector_lr",
    "mm_use_im_patch_token",
    "use_mm_proj",
}


def original_config(
    fields: Mapping[str, Any], *, dtype: str, vision_tower: pathlib.Path | None
) -> LlavaConfig:
    """The config of an original-format model; its `image_token_index` is negative.

    Args:
        fields: its config.json.
        dtype: of the parameters.
        vision_tower: the tower's directory; without one it is ViT-L/14 at 336 pixels.

    Raises:
        UserError: for settings that neither LLaVA-1.5 nor LLaVA-NeXT has.
    """
    where = "The original-format LLaVA config"
    if fields.get("mm_projector_type", "linear") != "mlp2x_gelu":
        raise UserError(
            f"{where} has mm_projector_type={fields.get('mm_projector_type')!r}; supported: "
            "'mlp2x_gelu', the projector of LLaVA-1.5 and LLaVA-NeXT."
        )
    if fields.get("mm_use_im_start_end"):
        raise UserError(
            f"{where} has mm_use_im_start_end=true, which LLaVA-1.5 and LLaVA-NeXT do not use."
        )
    kinds = ("llava", "llava_llama", "llava_mistral", "llama", "mistral")
    kind = require(fields, "model_type", kinds, where, "llava")
    ratios = (None, "square", "pad", "anyres")
    ratio = require(fields, "image_aspect_ratio", ratios, where, None)
    if vision_tower is None:
        vision = ClipVisionConfig(dtype=dtype)
        tower = str(fields["mm_vision_tower"])
        if "clip-vit-large-patch14-336" not in tower:
            raise UserError(
                f"{where} names the vision tower {tower!r}; pass its directory as vision_tower."
            )
    else:
        tower_fields = read_json(vision_tower / "config.json")
        tower_fields = tower_fields.get("vision_config", tower_fields)
        vision = ClipVisionConfig.from_hf(tower_fields, dtype=dtype)
    handled = {"mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"}
    handled |= {"mm_use_im_start_end"}
    text = {k: v for k, v in fields.items() if k not in handled | _INERT}
    text["model_type"] = "mistral" if "mistral" in kind else "llama"
    select = {"patch": "default", "cls_patch": "full"}
    feature = fields.get("mm_vision_select_feature", "patch")
    if feature not in select:
        raise UserError(f"{where} has mm_vision_select_feature={feature!r}; supported: {select}.")
    arguments = {
        "vision_config": vision,
        "text_config": LlamaConfig.from_hf(text, dtype=dtype),
        # The original tokenizer has no image token: images stand at this id of its own.
        "image_token_index": -200,
        "vision_feature_layer": fields.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": select[feature],
    }
    if ratio != "anyres":
        return LlavaConfig(**arguments)
    merge = fields.get("mm_patch_merge_type", "flat")
    if merge != "spatial_unpad":
        raise UserError(
            f"{where} has mm_patch_merge_type={merge!r}; supported with tiles: 'spatial_unpad', "
            "that of LLaVA-NeXT."
        )
    points = pinpoints(fields.get("image_grid_pinpoints"))
    # The original code has (width, height); which of two equally good tilings comes first
    # decides, so their order is kept.
    return LlavaNextConfig(
        **arguments, image_grid_pinpoints=tuple((height, width) for width, height in points)
    )
