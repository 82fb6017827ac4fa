"""Shape buckets: every array that reaches a compiled program has one of these sizes.

XLA compiles a program per shape. Rounding every dynamic size up to a listed one bounds the
number of programs by the product of the lists, whatever users send; the excess is masked.
`shapes` chooses from them, for `generate` and for `warmup` alike.
"""

import dataclasses

from jaxprune.errors import UserError, is_whole

_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """The sizes allowed for each dynamic dimension, ascending.

    Attributes:
        batch: rows of a request.
        images: images of a request, all rows together.
        image_tiles: tiles of one image, the same for all of a request.
        row_images: images of one row.
        visual: visual tokens of an image, before pruning where images differ and after an
            adaptive method; and of a row of several images.
        text: text tokens of a row.
        new_tokens: tokens to be generated. Room for more costs little: decoding reads a longer
            cache, and stops where the answer ends.
        schedule_lengths: how many different lengths a decoder's layers may have under a
            decoder-side method: each more saves padding and costs compile time. None takes
            every length as it is.

    Raises:
        UserError: for lists that are not ascending positive whole numbers.
    """

    batch: tuple[int, ...] = _POWERS
    images: tuple[int, ...] = _POWERS
    image_tiles: tuple[int, ...] = (1, 3, 5, 8, 13, 26, 40)
    row_images: tuple[int, ...] = _POWERS
    visual: tuple[int, ...] = (
        32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384,
        32768, 65536,
    )  # fmt: skip
    text: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    new_tokens: tuple[int, ...] = (128, 512, 2048, 4096)
    schedule_lengths: int | None = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name == "schedule_lengths":
                continue
            sizes = getattr(self, field.name)
            listed = isinstance(sizes, tuple | list) and all(map(is_whole, sizes))
            if not listed or not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise UserError(
                    f"The buckets for {field.name} are {sizes!r}; expected ascending positive "
                    "whole numbers in a tuple."
                )
            object.__setattr__(self, field.name, tuple(sizes))
        distinct = self.schedule_lengths
        if distinct is not None and (not is_whole(distinct) or distinct < 1):
            raise UserError(
                f"schedule_lengths is {distinct!r}; expected a whole number, 1 or more, or None."
            )

    def up_to(self, **most: int) -> "Buckets":
        """The same lists, each cut after the first bucket that holds what is named.

        `Buckets().up_to(batch=8, text=512)` chooses the shapes of `Buckets()`, but refuses
        requests of more than 8 rows or 512 text tokens.

        Raises:
            UserError: for a dimension that there is not, or a size over its largest bucket.
        """
        names = [field.name for field in dataclasses.fields(self)][:-1]
        for name in most:
            if name not in names:
                raise UserError(f"{name!r} is no dimension; expected one of: {', '.join(names)}.")
        lists = {name: getattr(self, name) for name in most}
        cut = {
            name: sizes[: sizes.index(self.fit(name, most[name])) + 1]
            for name, sizes in lists.items()
        }
        return dataclasses.replace(self, **cut)

    def fit(self, dimension: str, size: int) -> int:
        """The smallest bucket of `dimension` that holds `size`.

        Raises:
            UserError: when even the largest does not.
        """
        sizes: tuple[int, ...] = getattr(self, dimension)
        for bucket in sizes:
            if bucket >= size:
                return bucket
        raise UserError(
            f"The request needs {dimension}={size}, over the largest bucket {sizes[-1]}; pass "
            f"buckets=Buckets({dimension}=(..., {size})) to allow it, at the price of one more "
            "compilation."
        )


DEFAULT_BUCKETS = Buckets()
