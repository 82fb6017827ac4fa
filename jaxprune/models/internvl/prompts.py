"""How InternVL writes its prompts: by the `template` that the publisher's config.json names."""

import json
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from jaxprune.models.family import IMAGE_PLACEHOLDER

IMAGE_TOKEN = "<IMG_CONTEXT>"

# What InternVL2 and 2.5 are told before every conversation.
_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


class Format(NamedTuple):
    """A prompt format.

    Attributes:
        system: what is said before a conversation.
        start: text in front of the name of a role.
        named: text behind it.
        end: the token that ends a turn.
        between: text between that and the next turn.
    """

    system: str
    start: str
    named: str
    end: str
    between: str = ""


FORMATS: Mapping[str, Format] = {
    "Hermes-2": Format(_SYSTEM_2, "<|im_start|>", "\n", "<|im_end|>"),
    "internlm2-chat": Format(_SYSTEM_2, "<|im_start|>", "\n", "<|im_end|>"),
    "phi3-chat": Format(_SYSTEM_2, "<|", "|>\n", "<|end|>"),
    "internvl2_5": Format(_SYSTEM_2_5, "<|im_start|>", "\n", "<|im_end|>", "\n"),
}
"""By the name in config.json."""


def template_of(form: Format, *, image: str, system: str | None) -> str:
    """A format in Jinja, for messages of text or of parts.

    Args:
        form: the format.
        image: what is written for an image.
        system: what a conversation without a system message begins with; None: nothing.
    """
    start, named, end = (json.dumps(x) for x in (form.start, form.named, form.end + form.between))
    first = ""
    if system is not None:
        said = json.dumps(f"{form.start}system{form.named}{system}{form.end}{form.between}")
        first = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {said} }}}}{{% endif %}}"
    return (
        f"{first}"
        "{% for message in messages %}"
        f"{{{{ {start} + message['role'] + {named} }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {json.dumps(image + chr(10))} }}}}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        f"{{{{ {end} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {start} + 'assistant' + {named} }}}}{{% endif %}}"
    )


class InternVLPrompts:
    """The prompts of InternVL: a `models.family.PromptFormat`."""

    around_images = ("<img>", "</img>")
    image_token = video_token = IMAGE_TOKEN

    def template(
        self, fields: Mapping[str, Any], *, original: bool, end: str, vocabulary: Container[str]
    ) -> str | None:
        """The publisher's format that config.json names; elsewhere that of `transformers`."""
        del end, vocabulary
        if not original:
            return template_of(FORMATS["internvl2_5"], image=IMAGE_TOKEN, system=None)
        form = self._format(fields)
        if form is None:
            return None
        system = fields.get("system_message")
        system = system if isinstance(system, str) else form.system
        return template_of(form, image=IMAGE_PLACEHOLDER, system=system)

    def end(self, fields: Mapping[str, Any]) -> str | None:
        """What ends an answer: the end of a turn, whatever eos_token_id says."""
        form = self._format(fields)
        return None if form is None else form.end

    def _format(self, fields: Mapping[str, Any]) -> Format | None:
        name = fields.get("template")
        return FORMATS.get(name) if isinstance(name, str) else None


PROMPTS = InternVLPrompts()
