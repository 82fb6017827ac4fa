"""How Video-LLaVA writes its prompts: as LLaVA-1.5, to a human rather than a user."""

from jaxprune.models.llava.prompts import VICUNA_SYSTEM, ByDecoder, vicuna_template

HUMAN_SYSTEM = VICUNA_SYSTEM.replace("curious user", "curious human").replace("user's", "human's")


def video_template(*, original: bool, end: str) -> str:
    """The publisher's with its system prompt; elsewhere without one."""
    return vicuna_template(original=original, end=end, system=HUMAN_SYSTEM)


PROMPTS = ByDecoder({"": video_template}, video_token="<video>")
