"""The LLaMA decoder."""

from jaxprune.models.llama.config import LlamaConfig, RopeScaling
from jaxprune.models.llama.modeling import LayerCache, LlamaDecoder, Tokens

__all__ = ["LayerCache", "LlamaConfig", "LlamaDecoder", "RopeScaling", "Tokens"]
