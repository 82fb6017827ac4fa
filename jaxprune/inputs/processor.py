"""Tokenizer, image processor and chat template of a model directory."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxprune.errors import UserError
from jaxprune.files import read_json
from jaxprune.models.family import IMAGE_PLACEHOLDER, Family, ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Tokenizer and image processor of a model directory; compared by identity.

    Attributes:
        tokenizer: a `transformers` tokenizer.
        image_processor: a `transformers` image processor of the PIL backend.
        chat_template: Jinja template of the directory, or the family's own.
        eos_token_ids: what ends an answer.
        directory: where it came from; export copies its files.
        around_images: text in front of each image's tokens and after them.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str
    eos_token_ids: tuple[int, ...]
    directory: pathlib.Path | None = None
    around_images: tuple[str, str] = ("", "")

    @functools.cached_property
    def image_token_id(self) -> int | None:
        """The id of "<image>", or None for a tokenizer that does not know it."""
        found: int | None = self.tokenizer.get_vocab().get(IMAGE_PLACEHOLDER)
        return found


def load_processor(
    directory: pathlib.Path, family: Family, *, original: ModelConfig | None = None
) -> Processor:
    """Tokenizer, image processor and chat template of a model directory.

    Args:
        directory: the model's directory. Nothing in it is executed: `trust_remote_code`
            is off, and templates run in Jinja's sandbox.
        family: the model's, for what the directory does not say.
        original: for a directory in LLaVA's original format, which has no file for its
            image processor: the model's config.

    Raises:
        UserError: when a part is missing or damaged.
    """
    with _no_advice():  # imported here because it takes seconds
        from transformers import AutoImageProcessor, AutoTokenizer, LlamaTokenizer

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
            f"{directory} has no usable tokenizer ({first_line(error)}); expected "
            "tokenizer.json, or tokenizer.model with sentencepiece and protobuf installed "
            "(the extra `original`)."
        ) from None
    image_processor: Any
    if original is not None:
        pad = read_json(directory / "config.json").get("image_aspect_ratio") == "pad"
        image_processor = family.image_processor(original, pad=pad)
    else:
        try:
            image_processor = AutoImageProcessor.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except Exception as error:
            raise UserError(
                f"{directory} has no usable image processor ({first_line(error)}); expected "
                "preprocessor_config.json or processor_config.json."
            ) from None
    return Processor(
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=_chat_template(directory, tokenizer, family, original=original is not None),
        eos_token_ids=_eos_token_ids(directory, tokenizer),
        directory=directory,
        around_images=family.prompts.around_images,
    )


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
    directory: pathlib.Path, tokenizer: Any, family: Family, *, original: bool
) -> str:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (directory / name).is_file():
            template = read_json(directory / name).get("chat_template")
            if isinstance(template, str):
                return template
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    fields = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    text = fields.get("text_config")
    named = fields if original or not isinstance(text, dict) else text
    return family.prompts.template(
        str(named.get("model_type")), original=original, end=tokenizer.eos_token or ""
    )


def _eos_token_ids(directory: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    found: list[Any] = [tokenizer.eos_token_id]
    if (directory / "generation_config.json").is_file():
        listed = read_json(directory / "generation_config.json").get("eos_token_id")
        found += listed if isinstance(listed, list) else [listed]
    return tuple(sorted({token for token in found if isinstance(token, int)}))


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
