"""Activation functions by their Hugging Face names."""

import functools
from collections.abc import Callable

import jax


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI CLIP's approximation of GELU: `x * sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


def clipped_gelu(x: jax.Array) -> jax.Array:
    """GELU within -10 and 10."""
    return jax.numpy.clip(gelu(x), -10.0, 10.0)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu_10": clipped_gelu,
    **dict.fromkeys(("gelu", "gelu_python"), gelu),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
        gelu_tanh,
    ),
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
}
