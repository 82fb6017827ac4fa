"""How LLaVA-1.5 writes its prompts: `USER: <image>\\nquestion ASSISTANT:`."""

import json

from jaxprune.models.family import IMAGE_PLACEHOLDER, PromptFormat

# The system prompt in front of every conversation of the original LLaVA-1.5 code.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna_template(*, original: bool, end: str) -> str:
    """The Vicuna format in Jinja, for messages of text or of parts.

    Args:
        original: a conversation without a system message gets the original code's.
        end: of an answer.
    """
    system = (
        "{% if messages and messages[0]['role'] != 'system' %}"
        f"{{{{ {json.dumps(VICUNA_SYSTEM + ' ')} }}}}"
        "{% endif %}"
    )
    return (
        f"{system if original else ''}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        rf"{{% if part['type'] == 'image' %}}{{{{ '{IMAGE_PLACEHOLDER}\n' }}}}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'system' %}{{ ' ' }}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {json.dumps(end)} }}}}"
        "{% elif not loop.last or add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
        "{% endfor %}"
    )


# Tokens of ChatML and of Llama 3: decoders that have one were not taught Vicuna's format.
OTHER_FORMATS = ("<|im_start|>", "<|start_header_id|>")

PROMPTS = PromptFormat({"": vicuna_template}, other_formats=OTHER_FORMATS)
