"""What the vision transformers of all families share."""

from jaxprune.models.vit.modeling import VisionTransformer

__all__ = ["VisionTransformer"]
