"""The LLaMA decoder."""

from jaxprune.models.llama.config import LlamaConfig, RopeScaling
from jaxprune.models.llama.modeling import LlamaDecoder, text_tokens

__all__ = ["LlamaConfig", "LlamaDecoder", "RopeScaling", "text_tokens"]
