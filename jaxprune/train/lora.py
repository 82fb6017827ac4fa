"""Low-rank adapters (LoRA, arXiv 2106.09685) around the matrices of a decoder's layers.

A matrix W `[in, out]` acts as W + alpha / r A B, of which A `[in, r]` and B `[r, out]` alone are
trained. The base stays as it is: Flax lets us add to what its layers give. Over a base of 8 bits
adapters act in the same way, but cannot be merged into it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxprune.errors import UserError
from jaxprune.models.family import Arrays
from jaxprune.models.llama.modeling import PRODUCT, Int8Dense, LlamaLayer

Adapters = Mapping[str, Mapping[str, Any]]
"""`{"a": [in, r], "b": [r, out]}`, float32, by the path of a matrix's module in the decoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acting:
    """How adapters act.

    Attributes:
        scale: what their product is multiplied with: alpha / rank.
        dropout: the share of their inputs that is set to zero where there is a key.
    """

    scale: float
    dropout: float = 0.0


def matrices(decoder: Arrays) -> dict[str, Any]:
    """The matrices of a decoder's layers by the paths of their modules; not its head."""
    end = "/kernel"
    return {
        path.removesuffix(end): x
        for path, x in flatten_dict(decoder, sep="/").items()
        if path.startswith("layers_") and path.endswith(end)
    }


def init_adapters(decoder: Arrays, rank: int, key: Array) -> dict[str, dict[str, Array]]:
    """Adapters that change nothing yet, as PEFT begins them: A uniform, B zero.

    A is PyTorch's default for a linear layer, uniform in +-1 / sqrt(in).

    Args:
        decoder: its parameters.
        rank: r.
        key: of the random numbers.
    """
    adapters = {}
    for number, (path, kernel) in enumerate(sorted(matrices(decoder).items())):
        width, out = kernel.shape
        most, own = 1 / math.sqrt(width), jax.random.fold_in(key, number)
        a = jax.random.uniform(own, (width, rank), jnp.float32, -most, most)
        adapters[path] = {"a": a, "b": jnp.zeros((rank, out), jnp.float32)}
    return adapters


def adapted(
    adapters: Adapters, acting: Acting, key: Array | None = None
) -> AbstractContextManager[Any]:
    """A context in which every decoder that runs has the adapters.

    Args:
        adapters: float32; what they do is done in the dtype of the model.
        acting: how.
        key: of the dropout, folded with the number of each path; None drops nothing.
    """
    numbers = {path: number for number, path in enumerate(sorted(adapters))}

    def add(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, found = context.module, call(*args, **kwargs)
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | Int8Dense):
            return found
        path = "/".join(module.path)
        # Towers have modules of the same paths.
        if path not in adapters or not _of_a_decoder(module):
            return found
        own = None if key is None else jax.random.fold_in(key, numbers[path])
        added = _added(args[0], adapters[path]["a"], adapters[path]["b"], own, acting)
        # Named, so that where products are kept the sum is, and not each of its parts.
        return checkpoint_name((found.astype(jnp.float32) + added).astype(found.dtype), PRODUCT)

    return nn.intercept_methods(add)


def _of_a_decoder(module: Any) -> bool:
    """Whether a module is part of a decoder's layer, also where that is run by itself."""
    while isinstance(module, nn.Module):
        if isinstance(module, LlamaLayer):
            return True
        module = module.parent  # a scope, where a layer is computed again for its gradient
    return False


def _added(
    x: Float[Array, "*any D"],
    a: Float[Array, "D r"],
    b: Float[Array, "r N"],
    key: Array | None,
    acting: Acting,
) -> Float[Array, "*any N"]:
    """What an adapter adds to a product, float32; a gradient keeps nothing but its inputs.

    The dropped inputs would else be kept for every matrix, beside those of its base.
    """

    def product(x: Array, a: Array, b: Array) -> Array:
        if key is not None and acting.dropout:
            stays = jax.random.bernoulli(key, 1 - acting.dropout, x.shape)
            x = jnp.where(stays, x / (1 - acting.dropout), 0)
        low = x @ a.astype(x.dtype)
        high: Array = jnp.matmul(low, b.astype(x.dtype), preferred_element_type=jnp.float32)
        return acting.scale * high

    found: Array = jax.checkpoint(product)(x, a, b)
    return found


def merged_decoder(decoder: Arrays, adapters: Adapters, acting: Acting) -> Arrays:
    """A decoder's parameters with adapters added to its matrices, in the dtypes that these have.

    Raises:
        UserError: for matrices of 8 bits.
    """
    flat = dict(flatten_dict(decoder, sep="/"))
    for path, own in adapters.items():
        kernel = flat[f"{path}/kernel"]
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise UserError(
                "The base has matrices of 8 bits, whose steps are wider than what an adapter adds; "
                'load it with another dtype to merge, e.g. jaxprune.load(..., dtype="bfloat16").'
            )
        flat[f"{path}/kernel"] = _sum(kernel, own["a"], own["b"], acting.scale)
    whole: Arrays = unflatten_dict(flat, sep="/")
    return whole


@jax.jit
def _sum(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
