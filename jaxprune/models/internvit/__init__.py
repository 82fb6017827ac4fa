"""InternViT, the vision transformer of InternVL."""

from jaxprune.models.internvit.config import InternVitConfig
from jaxprune.models.internvit.modeling import InternVit

__all__ = ["InternVit", "InternVitConfig"]
