"""ConvNeXt, the convolutional tower of LLaVA-HR."""

from jaxprune.models.convnext.config import ConvNextConfig
from jaxprune.models.convnext.modeling import ConvNext

__all__ = ["ConvNext", "ConvNextConfig"]
