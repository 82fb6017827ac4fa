"""Products of one row with a matrix, which accelerators do not do as products.

A TPU's compiler puts them on the vector unit, at up to a twentieth of the rate; CUDA's sums what
it multiplied, and for that copies a cache to another layout. Two rows take the matrix unit, and
then the matrix's bytes are what bounds them. A CPU would do twice the work.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxprune.ops.axes import AnyArray

Product = Callable[[Any, Any], Array]


def at_least_two_rows(
    product: Product, rows: Float[AnyArray, "*any R D"], matrix: Num[AnyArray, "..."]
) -> Float[Array, "*any R N"]:
    """A product of rows with a matrix; on an accelerator of one row with another of zeros.

    Args:
        product: of the two, for any number of rows; hashable.
        rows: one or more.
        matrix: the other.
    """
    if rows.shape[-2] > 1:
        return product(rows, matrix)
    found: Array = _one_row(rows, matrix, product=product)
    return found


@functools.partial(jax.jit, static_argnames=("product",))  # traced once a shape
def _one_row(
    rows: Float[AnyArray, "*any 1 D"], matrix: Num[AnyArray, "..."], *, product: Product
) -> Float[Array, "*any 1 N"]:
    def padded(rows: Array, matrix: Array) -> Array:
        two = jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(0, 1), (0, 0)])
        return product(two, matrix)[..., :1, :]

    found: Array = jax.lax.platform_dependent(rows, matrix, cpu=product, default=padded)
    return found


@dataclasses.dataclass(frozen=True)
class Dense:
    """The product of a dense layer; hashable, so that programs share what is traced of it."""

    contracted: int
    precision: Any
    preferred_element_type: Any

    def __call__(self, rows: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(
            rows,
            kernel.astype(rows.dtype),  # a matrix of whole numbers is read as it is
            (((rows.ndim - 1,), (self.contracted,)), ((), ())),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


def dot_general(
    x: Float[Array, "..."],
    kernel: Num[Array, "D N"],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **_: Any,
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` of a dense layer, by the same rule."""

    product = Dense(dimension_numbers[0][1][0], precision, preferred_element_type)
    if math.prod(x.shape[:-1]) != 1:
        return product(x, kernel)
    found = at_least_two_rows(product, x.reshape(1, x.shape[-1]), kernel)
    return found.reshape(*x.shape[:-1], -1)
