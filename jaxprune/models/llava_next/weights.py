"""How LLaVA-NeXT is stored: as LLaVA, and the embedding between the rows of an image."""

from jaxprune.models.llava.weights import LLAVA
from jaxprune.models.weights import KEEP, KeyTable, Rule, Spelling

# First, since LLaVA takes any other `model.*` for the decoder's.
LLAVA_NEXT = (
    KeyTable(
        rules=(Rule("image_newline", "image_newline", KEEP),),
        spellings=(Spelling(r"model\.image_newline\Z", "image_newline"),),
    )
    + LLAVA
)
