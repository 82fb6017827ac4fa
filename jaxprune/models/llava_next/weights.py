"""How LLaVA-NeXT is stored: as LLaVA, and the embedding between the rows of an image."""

import functools

from jaxprune.models.llava.weights import llava_table
from jaxprune.models.weights import KEEP, KeyTable, Rule, Spelling

_NEWLINE = KeyTable(
    rules=(Rule("image_newline", "image_newline", KEEP),),
    spellings=(Spelling(r"model\.image_newline\Z", "image_newline"),),
)


@functools.cache
def llava_next_table(model_type: str) -> KeyTable:
    """How a LLaVA-NeXT is stored whose decoder `transformers` calls so."""
    # The newline first, since LLaVA takes any other `model.*` for the decoder's.
    return _NEWLINE + llava_table(model_type)
