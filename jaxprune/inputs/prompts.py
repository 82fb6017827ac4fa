"""Prompts: conversations -> text -> token ids around the images.

A conversation's messages hold text, or parts: texts and images in any order. An image stands
where its part is, where a user's plain text says "<image>", or else in front. Everywhere else
"<image>" is text: in parts, in what the assistant said, beside parts that are images, a single one
in the middle of a sentence, and where it is written "\\<image>".
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprune.errors import UserError
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.videos import Video
from jaxprune.models.family import IMAGE_PLACEHOLDER, VideoForm

Message = Mapping[str, Any]

AS_TEXT = "\U0010fffdimage\U0010fffd"
"""What stands for "<image>" that is text, until all that is an image is found."""
ESCAPED = "\\" + IMAGE_PLACEHOLDER
ZERO_WIDTH = "\u200b"

_ROLES = ("system", "user", "assistant")
_SOURCES = ("image", "video", "path", "url", "base64", "image_url")  # a part's key for its own
VIDEO_PLACEHOLDER = "<video>"
"""What users may write instead of "<image>" where a video stands."""
_PLACES = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")
_SLOT = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{AS_TEXT}")


def as_messages(
    prompt: Any, images: Sequence[Any], *, special_tokens: Sequence[str] = ()
) -> tuple[list[Message], list[Any]]:
    """A prompt string or a conversation, as messages of parts, and its images in their order.

    Args:
        prompt: text, or messages {"role", "content"} whose content is text or a list of parts
            {"type": "text", "text": ...} and {"type": "image"}. An image part may bring its
            image as "image", "path", "url", "base64" or OpenAI's "image_url". All other keys
            of messages and parts are for the chat template.
        images: for the places that do not bring their own.
        special_tokens: texts that are broken by a space of no width wherever they are said.

    Raises:
        UserError: for an empty or malformed prompt, or images that are not as many as places.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for message in messages:
        _check(message)
    if not messages or messages[-1]["role"] != "user":
        raise UserError("The conversation does not end with a user message; add the question.")
    placed = any(_is_image(part) for message in messages for part in _parts(message))
    placed = placed or not _plain_places(messages)
    found: list[Message] = []
    for message in messages:
        text_only = placed or message["role"] != "user" or not isinstance(message["content"], str)
        parts, before = [], ""
        for part in _parts(message):
            if not _is_image(part):
                text = _escaped(part["text"], text_only=text_only)
                part = {**part, "text": _neutral(text, special_tokens, before)}
                before = part["text"]
            parts.append(part)
        if isinstance(message["content"], str):
            parts = _in_front(parts[0]["text"])
        found.append({**message, "content": parts})
    texts = [part["text"] for part in found[-1]["content"] if not _is_image(part)]
    if not "".join(texts).replace(IMAGE_PLACEHOLDER, "").strip():
        raise UserError("The prompt is empty; ask something about the image.")
    if images and not _places(found):
        first = next(i for i, message in enumerate(found) if message["role"] == "user")
        front = [{"type": "image"}] * len(images)
        found[first] = {**found[first], "content": [*front, *found[first]["content"]]}
    return _with_images(found, images)


def _check(message: Any) -> None:
    """Raise `UserError` for a malformed message."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise UserError(f"A message is {message!r}; expected a dict with 'role' and 'content'.")
    if message["role"] not in _ROLES:
        raise UserError(
            f"A message has role {message['role']!r}; expected system, user or assistant."
        )
    for part in _parts(message):
        text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        if not _is_image(part) and not (text and part.get("type", "text") == "text"):
            raise UserError(
                f"A message has the content {part!r}; expected text, or parts "
                "{'type': 'text', 'text': ...} and {'type': 'image'}."
            )


def _parts(message: Message) -> list[Any]:
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, Sequence) else [content]


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url", "video")


def _escaped(text: str, *, text_only: bool) -> str:
    """A text in which "<image>" is left where it is an image's place."""
    text = text.replace(ESCAPED, AS_TEXT)
    return text.replace(IMAGE_PLACEHOLDER, AS_TEXT) if text_only else text


def _neutral(text: str, special_tokens: Sequence[str], before: str) -> str:
    """A text in which no special token is left, nor one that the text before it began."""
    tokens = [token for token in special_tokens if token != IMAGE_PLACEHOLDER]
    for token in tokens:
        text = text.replace(token, token[:1] + ZERO_WIDTH + token[1:])
    begins = (token[:length] for token in tokens for length in range(1, len(token)))
    return ZERO_WIDTH + text if before.rstrip().endswith(tuple(begins)) else text


def _in_front(text: str) -> list[dict[str, str]]:
    """Images in front of a text as parts of their own; a text with images between as it is.

    Templates put image parts first, each with a line break, so only those that are there
    anyway may be parts.
    """
    rest, images = text, 0
    while rest.startswith(IMAGE_PLACEHOLDER + "\n"):
        rest = rest.removeprefix(IMAGE_PLACEHOLDER + "\n")
        images += 1
    if IMAGE_PLACEHOLDER in rest:
        rest, images = text, 0
    return [{"type": "image"}] * images + [{"type": "text", "text": rest}]


def _places(messages: Sequence[Message]) -> Iterator[Any] | list[Any]:
    """The places of images: an image part, or None for one within a text."""
    found: list[Any] = []
    for message in messages:
        for part in message["content"]:
            found += [part] if _is_image(part) else [None] * part["text"].count(IMAGE_PLACEHOLDER)
    return found


def _with_images(
    messages: Sequence[Message], images: Sequence[Any]
) -> tuple[list[Message], list[Any]]:
    """The messages with image parts as templates know them, and the image of every place."""
    places = list(_places(messages))
    own = [None if place is None else source(place) for place in places]
    check_placeholders(sum(image is None for image in own), len(images))
    rest = iter(images)
    plain: list[Message] = [
        {
            **message,
            "content": [
                {**_without(part, _SOURCES), "type": "image"} if _is_image(part) else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    return plain, [next(rest) if image is None else image for image in own]


def _without(part: Message, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in names}


def source(part: Message) -> Any:
    """The image that a part brings, as `load_image` takes it, or a video; None: it brings none."""
    for name in _SOURCES:
        value = part.get(name)
        if isinstance(value, Mapping):  # OpenAI's {"url": ..., "detail": ...}
            value = value.get("url")
        if value is not None and part.get("type") == "video":
            return value if isinstance(value, Video) else Video(value)
        if value is not None:
            return f"data:;base64,{value}" if name == "base64" else value
    return None


def _videos(images: Any) -> bool:
    """Whether there is a video among images, however they are nested."""
    if isinstance(images, list | tuple):
        return any(map(_videos, images))
    return isinstance(images, Video)


def with_image_places(prompt: Any, images: Any) -> Any:
    """Prompts whose places for videos are written as those for images, if there are videos.

    Raises:
        UserError: where a video stands in the place of an image, or the other way round.
    """
    if not _videos(images):
        return prompt
    if isinstance(prompt, str):
        places = _PLACES.findall(prompt)
        if VIDEO_PLACEHOLDER in places and isinstance(images, list | tuple):
            flat = images[0] if len(images) == 1 and isinstance(images[0], list) else images
            kinds = [VIDEO_PLACEHOLDER if _videos(x) else IMAGE_PLACEHOLDER for x in flat]
            if len(kinds) == len(places) and kinds != places:
                raise UserError(
                    f"The prompt has places for {', '.join(places)}, but there came "
                    f"{', '.join(kinds)}; bring them into one order."
                )
        return prompt.replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
    if isinstance(prompt, list | tuple):
        nested = images if isinstance(images, list | tuple) and len(images) == len(prompt) else None
        return [
            with_image_places(one, images if nested is None else nested[i])
            for i, one in enumerate(prompt)
        ]
    if isinstance(prompt, Mapping) and isinstance(prompt.get("content"), str):
        content = prompt["content"].replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
        return {**prompt, "content": content}
    return prompt


def with_videos(
    messages: Sequence[Message], images: Sequence[Any], form: VideoForm | None
) -> list[Message]:
    """Messages whose places for videos say so, or have a place for each of the frames.

    Args:
        messages, images: as `as_messages` gives them.
        form: how the model sees videos.
    """
    if not _videos(images):
        return list(messages)
    rest = iter(images)
    found: list[Message] = []
    for message in messages:
        parts: list[Any] = []
        before = ""  # what belongs to the next text, since templates may trim parts
        for part in message["content"]:
            if not _is_image(part):
                text = part["text"]
                own = [next(rest) for _ in range(text.count(IMAGE_PLACEHOLDER))]
                parts.append({**part, "text": before + with_videos_in_text(text, own, form)})
                before = ""
                continue
            item = next(rest)
            if not isinstance(item, Video) or form is None:
                parts.append(part)
            elif form.text is None:
                parts.append({**part, "type": "video"})
            else:  # as text, for templates that put all image parts first
                before += with_videos_in_text(IMAGE_PLACEHOLDER, [item], form) + "\n"
        if before:
            parts.append({"type": "text", "text": before})
        found.append({**message, "content": parts})
    return found


def with_videos_in_text(text: str, images: Sequence[Any], form: VideoForm | None) -> str:
    """A text with a place for each frame of the videos among its images, where those are seen."""
    if form is None or form.text is None or not _videos(images):
        return text
    pieces = text.split(IMAGE_PLACEHOLDER)
    whole = pieces[0]
    for item, piece in zip(images, pieces[1:], strict=False):
        place = IMAGE_PLACEHOLDER
        if isinstance(item, Video):
            numbers = range(1, len(item.clip(form).frames) + 1)
            place = "\n".join(form.text.format(i=i) + IMAGE_PLACEHOLDER for i in numbers)
        whole += place + piece
    return whole


def num_places(prompt: Any) -> int:
    """How many images a prompt has places for that do not bring their own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        _check(message)
    parts = [(message, part) for message in messages for part in _parts(message)]
    images = [part for _, part in parts if _is_image(part)]
    if images:
        return sum(source(part) is None for part in images)
    return _plain_places(messages)


def _plain_places(messages: Sequence[Message]) -> int:
    """How many images plain text has places for.

    A single "<image>" in the middle of a sentence is none, but the word: "What does the <image>
    tag do?" is asked about an image in front.
    """
    plain = (m["content"] for m in messages if m["role"] == "user")
    text = "\n".join(x.replace(ESCAPED, "") for x in plain if isinstance(x, str))
    found = text.count(IMAGE_PLACEHOLDER)
    before, _, after = text.partition(IMAGE_PLACEHOLDER)
    within = before.rpartition("\n")[2].strip() and after.partition("\n")[0].strip()
    return 0 if found == 1 and within else found


def question_of(prompt: Any) -> str:
    """What the user asks last, on one line and without places of images; "" for no prompt."""
    if isinstance(prompt, str):
        text = _escaped(prompt, text_only=False).replace(IMAGE_PLACEHOLDER, " ")
        return " ".join(text.replace(AS_TEXT, IMAGE_PLACEHOLDER).split())
    last = prompt[-1] if isinstance(prompt, Sequence) and prompt else {}
    if not isinstance(last, Mapping) or "content" not in last:
        return ""
    if isinstance(last["content"], str):
        return question_of(last["content"])
    texts = [p.get("text") for p in _parts(last) if isinstance(p, Mapping) and not _is_image(p)]
    return " ".join(" ".join(text for text in texts if isinstance(text, str)).split())


def render(processor: Processor, messages: Sequence[Message]) -> str:
    """The conversation as one string, up to where the model is to answer.

    Args:
        processor: with the chat template.
        messages: as `as_messages` gives them.

    Raises:
        UserError: for what the template cannot render.
    """
    wanted = len(list(_places(messages)))
    text = _rendered(processor, messages)
    if text.count(IMAGE_PLACEHOLDER) != wanted and _has_videos(messages):
        text = _rendered(processor, _videos_as_images(messages))  # it may not know of videos
    if text.count(IMAGE_PLACEHOLDER) != wanted:
        raise UserError(
            f"The model's chat template makes {text.count(IMAGE_PLACEHOLDER)} places for "
            f"{wanted} image(s); pass the whole prompt yourself, with chat=False."
        )
    return text


def _has_videos(messages: Sequence[Message]) -> bool:
    return any(part.get("type") == "video" for m in messages for part in m["content"])


def _videos_as_images(messages: Sequence[Message]) -> list[Message]:
    def as_image(part: Message) -> Message:
        return {**part, "type": "image"} if part.get("type") == "video" else part

    return [{**m, "content": [as_image(part) for part in m["content"]]} for m in messages]


def _rendered(processor: Processor, messages: Sequence[Message]) -> str:
    """A conversation as its template writes it, places of images written one way."""
    if processor.template.takes_parts:
        text = processor.template.render(messages)
    else:
        text = processor.template.render([{**m, "content": _flat(m["content"])} for m in messages])
    text = text.replace(processor.image_token, IMAGE_PLACEHOLDER)
    return text.replace(processor.video_token, IMAGE_PLACEHOLDER) if _has_videos(messages) else text


def _flat(parts: Sequence[Mapping[str, Any]]) -> str:
    """Parts as a text, for a template that takes strings."""
    return "".join(IMAGE_PLACEHOLDER + "\n" if _is_image(part) else part["text"] for part in parts)


def as_it_stands(prompt: Any) -> str:
    """A prompt that is no conversation, as `tokenize` takes it.

    Raises:
        UserError: for what is no text, or has none.
    """
    if not isinstance(prompt, str):
        raise UserError("chat=False takes prompts as they stand; expected a string.")
    if not prompt.replace(IMAGE_PLACEHOLDER, "").strip():
        raise UserError("The prompt is empty; ask something about the image.")
    return _escaped(prompt, text_only=False)


def tokenize(processor: Processor, text: str, num_images: int) -> list[list[int]]:
    """Token ids between the images: `num_images + 1` lists.

    Args:
        processor: with the tokenizer.
        text: as `render` or `as_it_stands` gives it.
        num_images: places of images in it.

    Raises:
        UserError: when they are not as many.
    """
    check_placeholders(text.count(IMAGE_PLACEHOLDER), num_images)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The prompt is no valid text ({error}); repair its encoding.") from None
    before, after = processor.around_images
    text = text.replace(IMAGE_PLACEHOLDER, before + IMAGE_PLACEHOLDER + after)
    tokenizer, image_token = processor.tokenizer, processor.image_token_id
    add_bos = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    if image_token is not None:
        are_images = iter([found[0] == IMAGE_PLACEHOLDER for found in _SLOT.finditer(text)])
        whole = text.replace(AS_TEXT, IMAGE_PLACEHOLDER)
        pieces: list[list[int]] = [[]]
        for token in processor.ids_of(whole, add_special_tokens=add_bos):
            if token != image_token:
                pieces[-1].append(token)
            elif next(are_images, False):
                pieces.append([])
            else:
                pieces[-1] += processor.placeholder_as_text
        if len(pieces) != num_images + 1:
            raise UserError(
                f"The tokenizer finds {len(pieces) - 1} of {num_images} places for images; put "
                f"spaces around {IMAGE_PLACEHOLDER}."
            )
        return pieces
    # A tokenizer that does not know "<image>": the text around it, piece by piece.
    chunks = [c.replace(AS_TEXT, IMAGE_PLACEHOLDER) for c in text.split(IMAGE_PLACEHOLDER)]
    pieces = [processor.ids_of(chunk) for chunk in chunks]
    if add_bos and processor.adds_bos:
        pieces[0] = [tokenizer.bos_token_id, *pieces[0]]
    return pieces


def check_placeholders(found: int, num_images: int) -> None:
    """Raise `UserError` unless a prompt has one place for each of its images."""
    if found != num_images:
        raise UserError(
            f"The prompt has {found} {IMAGE_PLACEHOLDER} placeholder(s) but comes with "
            f"{num_images} image(s); give as many images as placeholders. "
            f"{ESCAPED} is the word itself."
        )
