"""Tokenizer, image processor and chat template of a model directory."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxprune.errors import LARGEST, UserError, UserNote, first_line, is_whole
from jaxprune.files import read_json
from jaxprune.inputs.template import ChatTemplate
from jaxprune.models.family import (
    IMAGE_PLACEHOLDER,
    Family,
    ModelConfig,
    VideoForm,
    is_original,
)
from jaxprune.models.registry import family_of
from jaxprune.ops.tiles import VisualSize

SHIPPED = pathlib.Path(__file__).parents[1] / "assets" / "small_llava"
"""The model that comes with this library, whose template is its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Tokenizer and image processor of a model directory; compared by identity.

    Attributes:
        tokenizer: a `transformers` tokenizer.
        image_processor: a `transformers` image processor of the PIL backend.
        template: the chat template of the directory, or the family's own.
        eos_token_ids: what ends an answer.
        directory: where it came from; export copies its files.
        around_images: text in front of each image's tokens and after them.
        image_token: what the chat template writes for an image.
        video_token: what it writes for a video.
        image_arguments: what the image processor is told of an image of some size beside its own
            settings.
        videos: how videos are seen, if they are.
        defaults: what the directory says of how to generate, by the names of `Ask`.
    """

    tokenizer: Any
    image_processor: Any
    template: ChatTemplate
    eos_token_ids: tuple[int, ...]
    directory: pathlib.Path | None = None
    around_images: tuple[str, str] = ("", "")
    image_token: str = IMAGE_PLACEHOLDER
    video_token: str = IMAGE_PLACEHOLDER
    image_arguments: Callable[[VisualSize], dict[str, Any]] = lambda size: {}
    videos: VideoForm | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def ids_of(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The token ids of a text.

        Raises:
            UserError: where the tokenizer's files are such that it fails.
        """
        return ids_of(self.tokenizer, text, add_special_tokens=add_special_tokens)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones left out.

        Raises:
            UserError: where the tokenizer's files are such that it fails.
        """
        with _told_of_tokenizer():
            text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
            return text

    @functools.cached_property
    def image_token_id(self) -> int | None:
        """The id of "<image>", or None for a tokenizer that does not know it."""
        found: int | None = self.tokenizer.get_vocab().get(IMAGE_PLACEHOLDER)
        return found

    @functools.cached_property
    def placeholder_as_text(self) -> list[int]:
        """The ids of "<image>" as a tokenizer would have it that does not know it."""

        def behind(before: str, text: str) -> list[int]:
            return self.ids_of(before + text)[len(self.ids_of(before)) :]

        return behind("a", IMAGE_PLACEHOLDER[:-1]) + behind("e", IMAGE_PLACEHOLDER[-1])

    @property
    def image_file(self) -> str:
        """The file that says how images are prepared, for messages."""
        path = None if self.directory is None else self.directory / "processor_config.json"
        nested = path is not None and path.is_file() and "image_processor" in read_json(path)
        return "processor_config.json" if nested else "preprocessor_config.json"

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts that the tokenizer does not take for text."""
        added = self.tokenizer.added_tokens_decoder.values()
        found = {str(token) for token in added if token.special} | {
            *self.tokenizer.all_special_tokens
        }
        return tuple(sorted(found, key=len, reverse=True))

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts its beginning of sequence in front of a text."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.ids_of("a", add_special_tokens=True)[:1] == [bos]


def ids_of(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """The token ids of a text, however long.

    Raises:
        UserError: where the tokenizer's files are such that it fails.
    """
    with _told_of_tokenizer():
        # Not verbose: what is too long for the model is refused elsewhere, in other words.
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids


def load_tokenizer(directory: pathlib.Path, model_type: str) -> Any:
    """The tokenizer of a directory with a model of some type of `transformers`.

    Raises:
        UserError: when it is missing or damaged.
    """
    with _no_advice():
        from transformers import AutoConfig

    return _tokenizer(directory, {"config": AutoConfig.for_model(model_type)}, original=False)


def load_processor(
    directory: pathlib.Path, config: ModelConfig, *, tokenizer: pathlib.Path | None = None
) -> Processor:
    """Tokenizer, image processor and chat template of a model directory.

    Args:
        directory: the model's directory. Nothing in it is executed: `trust_remote_code`
            is off, and templates run in Jinja's sandbox.
        config: the model's, whose family says what the directory does not.
        tokenizer: the tokenizer's directory, if it is another one.

    Raises:
        UserError: when a part is missing or damaged.
    """
    family, original = family_of(config), is_original(config)
    path = directory / "config.json"
    fields = read_json(path) if path.is_file() else {}
    kind = _kind_of(fields, config)
    words = directory if tokenizer is None else tokenizer
    known = _tokenizer(words, kind, original=original)
    if original:
        pad = fields.get("image_aspect_ratio") == "pad"
        image_processor = family.image_processor(config, pad=pad)
    else:
        image_processor = _image_processor(directory, kind)
    end = family.prompts.end(fields) if original else None
    if end is None:
        ends = _eos_token_ids(words, known)
    elif end in known.get_vocab():
        ends = (known.get_vocab()[end],)
    else:
        raise UserError(
            f"The tokenizer of {words} has no token {end!r}, with which the model ends its "
            "answers; it is of another model."
        )
    return Processor(
        tokenizer=known,
        image_processor=image_processor,
        template=_chat_template(words, known, family, fields, original=original),
        eos_token_ids=ends,
        directory=words,
        around_images=family.prompts.around_images,
        image_token=family.prompts.image_token,
        video_token=family.prompts.video_token,
        image_arguments=functools.partial(family.image_arguments, config),
        videos=family.videos,
        defaults=_generation_defaults(words),
    )


def _kind_of(fields: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What keeps transformers from reading config.json once more, by rules of its own."""
    with _no_advice():  # imported here because it takes seconds
        from transformers import CONFIG_MAPPING, AutoConfig

    if not is_original(config):
        return {"config": AutoConfig.for_model(config.family)}
    text: Any = config.text_config
    known = fields.get("model_type") in CONFIG_MAPPING
    return {} if known else {"config": AutoConfig.for_model(text.model_type)}


def _tokenizer(directory: pathlib.Path, kind: dict[str, Any], *, original: bool) -> Any:
    """The tokenizer of a directory."""
    with _no_advice():
        from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    tokenizer_class: Any = AutoTokenizer
    own: dict[str, Any] = {}
    path = directory / "tokenizer_config.json"
    named = read_json(path).get("tokenizer_class") if path.is_file() else None
    internlm2 = isinstance(named, str) and named.startswith("InternLM2")  # code beside the model
    has_json = (directory / "tokenizer.json").is_file()
    if internlm2 and has_json:
        tokenizer_class = PreTrainedTokenizerFast
    elif internlm2:
        tokenizer_class, own["add_prefix_space"] = LlamaTokenizer, False
    elif original and (directory / "tokenizer.model").is_file() and not has_json:
        # AutoTokenizer leaves out the space in front of a text where it builds the tokenizer of
        # a "llava" from tokenizer.model; LLaMA's own class does not.
        tokenizer_class = LlamaTokenizer
    try:
        return tokenizer_class.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, **kind, **own
        )
    except Exception as error:  # transformers raises many types for missing or odd files
        raise UserError(
            f"{directory} has no usable tokenizer ({first_line(error)}); expected "
            "tokenizer.json, or tokenizer.model with sentencepiece and protobuf installed "
            "(the extra `original`)."
        ) from None


def _image_processor(directory: pathlib.Path, kind: dict[str, Any]) -> Any:
    """The image processor of a directory."""
    with _no_advice():
        from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, backend="pil", **kind
        )
    except Exception as error:  # transformers raises many types for missing or odd files
        raise UserError(
            f"{directory} has no usable image processor ({first_line(error)}); expected "
            "preprocessor_config.json or processor_config.json."
        ) from None


@contextlib.contextmanager
def _told_of_tokenizer() -> Iterator[None]:
    """A `UserError` for whatever a tokenizer does instead of its work; it may even panic."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        raise UserError(
            f"The tokenizer fails ({first_line(error)}); check tokenizer.json and "
            "tokenizer_config.json."
        ) from None


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
    directory: pathlib.Path,
    tokenizer: Any,
    family: Family,
    fields: Mapping[str, Any],
    *,
    original: bool,
) -> ChatTemplate:
    """The template that `transformers` 5 takes; else the tokenizer's, else the family's."""
    variables = dict(tokenizer.special_tokens_map)
    text = _stored_template(directory) or _default_of(tokenizer.chat_template)
    if text is not None:
        return ChatTemplate(text, variables, trusted=directory == SHIPPED)
    own = family.prompts.template(
        fields,
        original=original,
        end=tokenizer.eos_token or "",
        vocabulary=tokenizer.get_vocab(),
    )
    return ChatTemplate(own, variables, trusted=True)


def _stored_template(directory: pathlib.Path) -> str | None:
    for name in ("processor_config.json", "chat_template.json"):
        if (directory / name).is_file():
            found = _default_of(read_json(directory / name).get("chat_template"))
            if found is not None:
                return found
    for path in (
        directory / "chat_template.jinja",
        directory / "additional_chat_templates" / "default.jinja",
    ):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read as text ({first_line(error)}).") from None
    return None


def _default_of(template: Any) -> str | None:
    """A template, or of several named ones the default."""
    if isinstance(template, list):
        template = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _eos_token_ids(directory: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer: as generation_config.json says, else config.json, else the tokenizer."""
    for where, fields in _generation_fields(directory):
        listed = fields.get("eos_token_id")
        if listed is None:
            continue
        ids = listed if isinstance(listed, list) else [listed]
        for token in ids:
            if not is_whole(token) or abs(token) > LARGEST:
                raise UserError(f"{where} has eos_token_id={listed!r}; expected ids of tokens.")
        return tuple(sorted(set(ids)))
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


_DEFAULTS = ("repetition_penalty", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens")
# Fields of a generation_config.json that would change an answer in transformers, and not here.
_OTHERS = """
    do_sample num_beams num_beam_groups penalty_alpha no_repeat_ngram_size bad_words_ids min_length
    encoder_repetition_penalty encoder_no_repeat_ngram_size forced_bos_token_id
    forced_eos_token_id exponential_decay_length_penalty sequence_bias guidance_scale
    diversity_penalty constraints force_words_ids stop_strings prompt_lookup_num_tokens
""".split()  # noqa: SIM905  one a word reads better


def _generation_defaults(directory: pathlib.Path) -> dict[str, Any]:
    """The settings of generation_config.json that act here too; a warning names the others."""
    path = directory / "generation_config.json"
    fields = read_json(path) if path.is_file() else {}
    usual: tuple[Any, ...] = (None, False, 0, 1, [], {})
    others = [n for n in _OTHERS if fields.get(n) is True or fields.get(n) not in usual]
    if others:
        warnings.warn(
            f"{path} sets {', '.join(others)}, which does not act here: an answer is the likeliest "
            "unless generate is told otherwise.",
            UserNote,
            stacklevel=4,
        )
    return {name: fields[name] for name in _DEFAULTS if fields.get(name) is not None}


def _generation_fields(directory: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where `transformers` looks for how to generate, in its order."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            fields = read_json(directory / name)
            yield name, fields
            if isinstance(fields.get("text_config"), dict):
                yield f"{name}, text_config", fields["text_config"]
