"""CLIP's vision transformer."""

from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.clip.modeling import ClipVisionTower

__all__ = ["ClipVisionConfig", "ClipVisionTower"]
