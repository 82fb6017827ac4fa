"""How LLaVA-1.5 writes its prompts: `USER: <image>\\nquestion ASSISTANT:`."""

import dataclasses
import json
from collections.abc import Container, Mapping
from typing import Any, Protocol

from jaxprune.models.family import IMAGE_PLACEHOLDER

# The system prompt in front of every conversation of the original LLaVA-1.5 code.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna_template(*, original: bool, end: str, system: str = VICUNA_SYSTEM) -> str:
    """The Vicuna format in Jinja, for messages of text or of parts.

    Args:
        original: a conversation without a system message gets the original code's.
        end: of an answer.
        system: that message.
    """
    first = (
        "{% if messages and messages[0]['role'] != 'system' %}"
        f"{{{{ {json.dumps(system + ' ')} }}}}"
        "{% endif %}"
    )
    return (
        f"{first if original else ''}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        rf"{{% if part['type'] in ('image', 'video') %}}{{{{ '{IMAGE_PLACEHOLDER}\n' }}}}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'system' %}{{ ' ' }}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {json.dumps(end)} }}}}"
        "{% elif not loop.last or add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
        "{% endfor %}"
    )


# Tokens of ChatML and of Llama 3: decoders that have one were not taught Vicuna's format.
OTHER_FORMATS = ("<|im_start|>", "<|start_header_id|>")


class Template(Protocol):
    """A chat template, as text in Jinja."""

    def __call__(self, *, original: bool, end: str) -> str | None:
        """The template of a model in its publisher's form, or of any other; None: unknown.

        Args:
            original: whether the directory is in the publisher's form.
            end: the tokenizer's end of an answer.
        """


@dataclasses.dataclass(frozen=True)
class ByDecoder:
    """Prompts that are written as the decoder was taught: a `PromptFormat`.

    Attributes:
        templates: by a part of the decoder's `model_type`; the first that fits is taken, and
            "" fits all.
        around_images: text in front of each image's tokens and after them.
        other_formats: tokens of other prompt formats: a decoder whose vocabulary has one was
            taught that format, and no template here is its own.
        image_token, video_token: what the templates of directories write for an image and for a
            video.
    """

    templates: Mapping[str, Template]
    around_images: tuple[str, str] = ("", "")
    other_formats: tuple[str, ...] = ()
    image_token: str = IMAGE_PLACEHOLDER
    video_token: str = IMAGE_PLACEHOLDER

    def template(
        self, fields: Mapping[str, Any], *, original: bool, end: str, vocabulary: Container[str]
    ) -> str | None:
        """The template of a model whose directory has none; None: not known."""
        if any(token in vocabulary for token in self.other_formats):
            return None
        decoder = fields.get("text_config")
        named = fields if original or not isinstance(decoder, Mapping) else decoder
        kind = str(named.get("model_type"))
        make = next((make for name, make in self.templates.items() if name in kind), None)
        return None if make is None else make(original=original, end=end)

    def end(self, fields: Mapping[str, Any]) -> str | None:
        """As the directory says."""
        del fields
        return None


PROMPTS = ByDecoder({"": vicuna_template}, other_formats=OTHER_FORMATS)
