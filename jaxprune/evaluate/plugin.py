"""What lmms-eval finds of jaxprune by its entry point, and how its requests are read.

    lmms-eval eval --model jaxprune --model_args pretrained=DIR,method=prumerge_plus,keep=64 ...

This module imports nothing of lmms-eval before it is asked for: whatever fails while entry points
are loaded is only a warning there. The model itself is in `lmms.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune.engine.buckets import DEFAULT_BUCKETS
from jaxprune.errors import UserError
from jaxprune.inputs.videos import Video

MAX_NEW_TOKENS = 1024  # of tasks that name none, as lmms-eval's own models have it


def manifest() -> Any:
    """How lmms-eval names and finds the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="jaxprune", chat_class_path="jaxprune.evaluate.lmms.JaxPrune")


def method_of(text: Any) -> Any:
    """The method of --model_args, where a comma ends a value: a pair has a plus sign between."""
    parts = text.split("+") if isinstance(text, str) else [text]
    return parts[0] if len(parts) == 1 else tuple(part.strip() for part in parts)


def request_of(messages: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A request to `generate_many`.

    Args:
        messages: a conversation as a task gives it, its images in the place of their address;
            videos go by their file.
        asked: the task's generation options. `until` ends an answer, though most of lmms-eval's
            own models leave it out. The temperature alone says whether tokens are drawn.

    Raises:
        UserError: for audio or beams, which are not supported, and for a video that cannot be read.
    """
    if (asked.get("num_beams") or 1) > 1:
        raise UserError(f"num_beams is {asked['num_beams']}; jaxprune searches no beams. Set 1.")
    temperature = asked.get("temperature")
    if temperature is None:
        temperature = 1.0 if asked.get("do_sample") else 0.0
    until = asked.get("until") or ()
    most = asked.get("max_new_tokens") or MAX_NEW_TOKENS
    request: dict[str, Any] = {
        "prompt": [
            {"role": message["role"], "content": [_part(part) for part in message["content"]]}
            for message in messages
        ],
        "max_new_tokens": min(int(most), DEFAULT_BUCKETS.new_tokens[-1]),
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "temperature": float(temperature),
    }
    if temperature > 0:  # what else a task sets then, such as top_p=0, has no meaning
        request |= {name: asked[name] for name in ("top_k", "top_p") if asked.get(name)}
    for name in ("seed", "repetition_penalty"):
        if asked.get(name) is not None:
            request[name] = asked[name]
    return request


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    image = part.get("url")
    if part["type"] == "video":
        image = Video(image)  # which a model without videos refuses
    elif part["type"] != "image":
        raise UserError(
            f"There is {part['type']} in the question; jaxprune answers about images and videos."
        )
    elif isinstance(image, Mapping):  # a data set's undecoded image
        image = image.get("bytes") or image.get("path")
    return {"type": "image", "image": image}
