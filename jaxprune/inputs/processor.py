"""Host side of a request: images to pixels, prompts to token ids, token ids to text."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxprune.errors import UserError
from jaxprune.files import read_json
from jaxprune.inputs.images import crop_strip

IMAGE_PLACEHOLDER = "<image>"
MOST_ENLARGED = 16  # sides of a tile that an image may be resized to before it is cropped
Message = Mapping[str, Any]

# Mean and deviation of the channels that CLIP was trained with.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

# The system prompt in front of every conversation of the original LLaVA-1.5 code.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions."
)


# What LLaVA-NeXT with Mistral was trained on: instructions in brackets, no system prompt.
MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% else %}{{ '[INST] ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    rf"{{% if part['type'] == 'image' %}}{{{{ '{IMAGE_PLACEHOLDER}\n' }}}}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Tokenizer and image processor of a model directory; compared by identity.

    Attributes:
        tokenizer: a `transformers` tokenizer.
        image_processor: a `transformers` image processor of the PIL backend.
        chat_template: Jinja template of the directory, or None for LLaVA-1.5's own format.
        eos_token_ids: what ends an answer.
        directory: where it came from; export copies its files.
        system: text in front of a conversation, used with LLaVA-1.5's own format only.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    directory: pathlib.Path | None = None
    system: str | None = None

    @functools.cached_property
    def image_token_id(self) -> int | None:
        """The id of "<image>", or None for a tokenizer that does not know it."""
        return self.tokenizer.get_vocab().get(IMAGE_PLACEHOLDER)


def pixel_values(processor: Processor, images: Sequence[Image.Image], config: Any) -> np.ndarray:
    """RGB images -> normalised pixels of all their tiles, float32 `[F, size, size, 3]`.

    The tiles of an image stand next to each other; `config.tiling` says how many there are.

    Raises:
        UserError: when the processor's tiles are not what the vision tower takes.
    """
    size = config.vision_config.image_size
    asked = getattr(processor.image_processor, "size", None) or {}
    largest = max((n for n in dict(asked).values() if isinstance(n, int)), default=0)
    if largest > MOST_ENLARGED * size:
        raise UserError(
            f"preprocessor_config.json resizes images to {largest} pixels, but the vision tower "
            f"takes {size}; it is of another model."
        )
    tiles: list[np.ndarray] = []
    for image in images:
        tiling = config.tiling(image.height, image.width)
        array = np.asarray(crop_strip(image) if tiling.tiles == 1 else image)
        try:
            made = processor.image_processor(array, input_data_format="channels_last")
            found = np.asarray(made["pixel_values"][0], np.float32)
            found = np.moveaxis(found.reshape(-1, *found.shape[-3:]), 1, -1)
        except Exception as error:  # whatever transformers makes of odd settings
            raise UserError(
                f"The image processor fails ({_first_line(error)}); check preprocessor_config.json."
            ) from None
        if found.shape[1:] != (size, size, 3):
            raise UserError(
                f"The image processor gives {found.shape[1]} x {found.shape[2]} pixels, but the "
                f"vision tower takes {size} x {size}; preprocessor_config.json is of another model."
            )
        if len(found) != tiling.tiles:
            raise UserError(
                f"The image processor cuts an image of {image.width} x {image.height} pixels into "
                f"{len(found)} tiles, but the model expects {tiling.tiles}; preprocessor_config."
                "json and config.json have different image_grid_pinpoints."
            )
        if not np.isfinite(found).all():
            raise UserError(
                "The image processor gives pixels that are not finite; check image_std in "
                "preprocessor_config.json."
            )
        tiles.append(found)
    return np.concatenate(tiles)


def as_messages(prompt: Any, num_images: int) -> list[Message]:
    """A prompt string or a conversation, as a conversation that ends with the user.

    Args:
        prompt: text, or messages {"role", "content"} whose content is text or a list of
            parts {"type": "text", "text": ...} and {"type": "image"}.
        num_images: images that go with it. Where the prompt has no placeholder they stand
            in front of the first user message.

    Raises:
        UserError: for an empty or malformed prompt.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    texts = [message_text(message) for message in messages]
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise UserError(
                f"A message has role {message['role']!r}; expected system, user or assistant."
            )
    if not messages or messages[-1]["role"] != "user":
        raise UserError("The conversation does not end with a user message; add the question.")
    flat: list[Message] = [
        {**message, "content": text} for message, text in zip(messages, texts, strict=True)
    ]
    if not flat[-1]["content"].replace(IMAGE_PLACEHOLDER, "").strip():
        raise UserError("The prompt is empty; ask something about the image.")
    found = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in flat)
    if found:
        check_placeholders(found, num_images)
    elif num_images:
        first = next(i for i, m in enumerate(flat) if m["role"] == "user")
        front = (IMAGE_PLACEHOLDER + "\n") * num_images
        flat[first] = {**flat[first], "content": front + flat[first]["content"]}
    return flat


def message_text(message: Any) -> str:
    """The content of a message as text, with a placeholder where an image part stands.

    Raises:
        UserError: for a malformed message.
    """
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise UserError(f"A message is {message!r}; expected a dict with 'role' and 'content'.")
    content = message["content"]
    if isinstance(content, str):
        return content
    pieces = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            pieces.append(IMAGE_PLACEHOLDER + "\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            raise UserError(
                f"A message has the content {part!r}; expected text, or parts "
                "{'type': 'text', 'text': ...} and {'type': 'image'}."
            )
    return "".join(pieces)


def render(processor: Processor, messages: Sequence[Message]) -> str:
    """The conversation as one string, up to where the model is to answer."""
    if processor.chat_template is None:
        return _llava_format(processor, messages)
    as_parts = [{**m, "content": _as_parts(m["content"])} for m in messages]
    wanted = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages)
    question = as_parts[-1]["content"][-1]["text"].strip()
    # A processor's template takes parts, a text tokenizer's takes strings.
    problem: Exception | None = None
    for candidate in (as_parts, list(messages)):
        try:
            text = processor.tokenizer.apply_chat_template(
                candidate,
                chat_template=processor.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # whatever a template raises, of its own or Jinja's
            problem = error
            continue
        # A template for strings would spell the parts out as Python.
        spelled = "{'type'" in text and "{'type'" not in question
        if text.count(IMAGE_PLACEHOLDER) == wanted and question in text and not spelled:
            return text
    raise UserError(
        "The model's chat template cannot render this conversation "
        f"({problem or 'parts are lost'}); pass the whole prompt yourself, with chat=False."
    )


def _as_parts(content: str) -> list[dict[str, str]]:
    """Images in front as parts of their own; text with images between words as it is.

    Templates put image parts first, each with a line break, so only those that are there
    anyway may be parts.
    """
    rest, images = content, 0
    while rest.startswith(IMAGE_PLACEHOLDER + "\n"):
        rest = rest.removeprefix(IMAGE_PLACEHOLDER + "\n")
        images += 1
    if IMAGE_PLACEHOLDER in rest:
        rest, images = content, 0
    return [{"type": "image"}] * images + [{"type": "text", "text": rest}]


def _llava_format(processor: Processor, messages: Sequence[Message]) -> str:
    """`USER: <image>\\nquestion ASSISTANT:`, LLaVA-1.5's format, several turns joined."""
    end = processor.tokenizer.eos_token or ""
    text = ""
    if messages[0]["role"] != "system" and processor.system:
        text = processor.system + " "
    for message in messages:
        if message["role"] == "system":
            text += message["content"] + " "
        elif message["role"] == "user":
            text += f"USER: {message['content']} ASSISTANT:"
        else:
            text += f" {message['content']}{end}"
    return text


def tokenize(processor: Processor, text: str, num_images: int) -> list[list[int]]:
    """Token ids between the images: `num_images + 1` lists.

    Raises:
        UserError: when the placeholders in `text` are not as many as the images.
    """
    check_placeholders(text.count(IMAGE_PLACEHOLDER), num_images)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The prompt is no valid text ({error}); repair its encoding.") from None
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    add_bos = not (bos and text.startswith(bos))
    if processor.image_token_id is not None or not num_images:
        ids = tokenizer(text, add_special_tokens=add_bos)["input_ids"]
        pieces: list[list[int]] = [[]]
        for token in ids:
            if num_images and token == processor.image_token_id:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return pieces
    # A tokenizer that does not know "<image>": the text around it, piece by piece.
    chunks = text.split(IMAGE_PLACEHOLDER)
    pieces = [tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in chunks]
    if add_bos and tokenizer.bos_token_id is not None:
        pieces[0] = [tokenizer.bos_token_id, *pieces[0]]
    return pieces


def check_placeholders(found: int, num_images: int) -> None:
    """Raise `UserError` unless a prompt has one placeholder for each of its images."""
    if found != num_images:
        raise UserError(
            f"The prompt has {found} {IMAGE_PLACEHOLDER} placeholder(s) but comes with "
            f"{num_images} image(s); give as many images as placeholders."
        )


def decode_text(processor: Processor, token_ids: Sequence[int]) -> str:
    """Token ids -> text, special tokens left out."""
    return processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def load_processor(directory: pathlib.Path, *, original: Any = None) -> Processor:
    """Tokenizer, image processor and chat template of a model directory.

    Args:
        directory: the model's directory. Nothing in it is executed: `trust_remote_code`
            is off, and templates run in Jinja's sandbox.
        original: for a directory in LLaVA's original format, which has no file for its
            image processor: the model's config.

    Raises:
        UserError: when a part is missing or damaged.
    """
    with _no_advice():  # imported here because it takes seconds
        from transformers import AutoImageProcessor, AutoTokenizer, LlamaTokenizer
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil,
        )

    # AutoTokenizer leaves out the space in front of a text where it builds the tokenizer of
    # a "llava" from tokenizer.model; LLaMA's own class does not.
    has_json = (directory / "tokenizer.json").is_file()
    from_model = original and not has_json and (directory / "tokenizer.model").is_file()
    tokenizer_class = LlamaTokenizer if from_model else AutoTokenizer
    try:
        tokenizer = tokenizer_class.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types for missing or odd files
        raise UserError(
            f"{directory} has no usable tokenizer ({_first_line(error)}); expected "
            "tokenizer.json, or tokenizer.model with sentencepiece and protobuf installed "
            "(the extra `original`)."
        ) from None
    image_processor: Any
    if original is not None:
        side = original.vision_config.image_size
        sizes: dict[str, Any] = {
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
        }
        if original.one_tile:
            pad = read_json(directory / "config.json").get("image_aspect_ratio") == "pad"
            image_processor = LlavaImageProcessorPil(do_pad=pad, **sizes)
        else:
            points = [list(point) for point in original.image_grid_pinpoints]
            image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=points, **sizes)
    else:
        try:
            image_processor = AutoImageProcessor.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except Exception as error:
            raise UserError(
                f"{directory} has no usable image processor ({_first_line(error)}); expected "
                "preprocessor_config.json or processor_config.json."
            ) from None
    return Processor(
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=_chat_template(directory, tokenizer, original=original is not None),
        eos_token_ids=_eos_token_ids(directory, tokenizer),
        directory=directory,
        system=VICUNA_SYSTEM if original is not None else None,
    )


def processor_files(config: Any, *, do_pad: bool = False) -> dict[str, dict[str, Any]]:
    """The files from which `transformers` makes the processor of a LLaVA with a CLIP tower.

    Args:
        config: the model's config, of LLaVA-1.5 or LLaVA-NeXT.
        do_pad: LLaVA-1.5: images are padded to squares, instead of losing what sticks out.

    Returns:
        File names and what JSON they hold.
    """
    side = config.vision_config.image_size
    own: dict[str, Any]
    if config.one_tile:
        # CLIP's is known to every release, LLaVA's is the one that can pad.
        name, own = ("LlavaImageProcessor", {"do_pad": True}) if do_pad else (
            "CLIPImageProcessor", {}
        )  # fmt: skip
    else:
        points = [list(point) for point in config.image_grid_pinpoints]
        name, own = "LlavaNextImageProcessor", {"do_pad": True, "image_grid_pinpoints": points}
    preprocessor = {
        "image_processor_type": name,
        "do_convert_rgb": True,
        **own,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    processor = {
        "processor_class": "LlavaProcessor" if config.one_tile else "LlavaNextProcessor",
        "image_token": IMAGE_PLACEHOLDER,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # CLS, which the strategy "default" takes off again
    }
    return {"preprocessor_config.json": preprocessor, "processor_config.json": processor}


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Without torch, transformers advises to install it; this library does not need it."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _chat_template(
    directory: pathlib.Path, tokenizer: Any, *, original: bool = False
) -> str | None:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (directory / name).is_file():
            template = read_json(directory / name).get("chat_template")
            if isinstance(template, str):
                return template
    template = tokenizer.chat_template
    if isinstance(template, str):
        return template
    # The original code has its formats in Python, chosen by the name of the model.
    named = str(read_json(directory / "config.json").get("model_type")) if original else ""
    return MISTRAL_TEMPLATE if "mistral" in named else None


def _eos_token_ids(directory: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    found: list[Any] = [tokenizer.eos_token_id]
    if (directory / "generation_config.json").is_file():
        listed = read_json(directory / "generation_config.json").get("eos_token_id")
        found += listed if isinstance(listed, list) else [listed]
    return tuple(sorted({token for token in found if isinstance(token, int)}))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
