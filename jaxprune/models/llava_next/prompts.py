"""How LLaVA-NeXT writes its prompts: as its decoder was trained to read them."""

from jaxprune.models.family import IMAGE_PLACEHOLDER
from jaxprune.models.llava.prompts import OTHER_FORMATS, ByDecoder, vicuna_template

# With Mistral: instructions in brackets, no system prompt.
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


def mistral_template(*, original: bool, end: str) -> str:
    """Mistral's format, the same everywhere: the tokenizer knows its own end of an answer."""
    del original, end
    return MISTRAL_TEMPLATE


def template_of_llama(*, original: bool, end: str) -> str | None:
    """Vicuna's in the publisher's format; elsewhere decoders of several formats are LLaMAs."""
    return vicuna_template(original=True, end=end) if original else None


PROMPTS = ByDecoder(
    {"mistral": mistral_template, "": template_of_llama}, other_formats=OTHER_FORMATS
)
