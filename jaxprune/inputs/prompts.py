"""Prompts: conversations -> text -> token ids around the images, and token ids -> text."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune.errors import UserError
from jaxprune.inputs.processor import Processor
from jaxprune.models.family import IMAGE_PLACEHOLDER

Message = Mapping[str, Any]


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


def question_of(prompt: Any) -> str:
    """What the user asks last, without placeholders; "" for what is no prompt."""
    if isinstance(prompt, str):
        text = prompt
    else:
        last = prompt[-1] if isinstance(prompt, Sequence) and prompt else {}
        text = message_text(last) if isinstance(last, Mapping) and "content" in last else ""
    return text.replace(IMAGE_PLACEHOLDER, " ").strip()


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
    as_parts = [{**m, "content": _as_parts(m["content"])} for m in messages]
    wanted = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages)
    question = as_parts[-1]["content"][-1]["text"].strip()
    # A processor's template takes parts, a text tokenizer's takes strings.
    problem: Exception | None = None
    for candidate in (as_parts, list(messages)):
        try:
            text: str = processor.tokenizer.apply_chat_template(
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


def tokenize(processor: Processor, text: str, num_images: int) -> list[list[int]]:
    """Token ids between the images: `num_images + 1` lists.

    Raises:
        UserError: when the placeholders in `text` are not as many as the images.
    """
    check_placeholders(text.count(IMAGE_PLACEHOLDER), num_images)
    before, after = processor.around_images
    text = text.replace(IMAGE_PLACEHOLDER, before + IMAGE_PLACEHOLDER + after)
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
