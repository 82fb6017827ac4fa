"""CLIP's two transformers: of images and of texts."""

from jaxprune.models.clip.config import ClipTextConfig, ClipVisionConfig
from jaxprune.models.clip.modeling import ClipTextTower, ClipVisionTower

__all__ = ["ClipTextConfig", "ClipTextTower", "ClipVisionConfig", "ClipVisionTower"]
