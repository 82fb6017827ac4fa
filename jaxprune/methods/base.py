"""What a pruning method is: hyperparameters in a frozen dataclass, and pure functions.

A class of a user's own, derived from one of these, works wherever a method that ships does;
docs/extending.md has one of each side.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import UserError, check_choice, check_share, is_number, is_whole
from jaxprune.ops.cuts import (
    AFTER_ATTENTION,
    BETWEEN_LAYERS,
    ByAttention,
    Depth,
    LayerView,
    Ranker,
    Recycled,
    Score,
    keep_best,
)
from jaxprune.ops.tiles import Chosen, ExtraTokens, Patches
from jaxprune.ops.visual import TEXT_SIMILARITY, Signal, VisionOutput

POSITIONS = ("renumber", "original")


class Plan(NamedTuple):
    """What a request does before the decoder and inside it; None does nothing."""

    vision: "VisionMethod | None" = None
    decoder: "DecoderMethod | None" = None

    def plan(self) -> "Plan":
        """A plan is a method itself."""
        return self


@runtime_checkable
class Method(Protocol):
    """Whatever says how to prune: a method of one side, or of both."""

    def plan(self) -> Plan:
        """What it does on each side."""


@runtime_checkable  # so that the tests can check it
class MethodClass(Protocol):
    """A class of methods: what listings and names ask of it."""

    name: str
    side: str
    paper: str
    summary: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        """A method with these hyperparameters."""


class Merged(NamedTuple):
    """What a method that merges makes of tiles.

    Attributes:
        tokens: `[F, K, C]`, the kept patches.
        extra: `[F, E, C]`, the tile's extra tokens, those in front of the image first.
    """

    tokens: Float[Array, "F K C"]
    extra: Float[Array, "F E C"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionMethod:
    """Shortens an image before the decoder sees it.

    A method is hashable data. Jitted stages take it as a tree whose leaves are the fields named
    in `traced`: methods that differ in nothing else run the same program. CLS tokens that are
    features and newlines are not patches: a method never chooses them.

    Of an image of several tiles a method that decides by the image looks at every tile for
    itself; a fixed number of patches is counted over all tiles together, among the patches
    that the decoder would read.

    Args:
        positions: "renumber": kept tokens take the positions 0, 1, 2 ... of a shorter image;
            "original": each keeps the one that it has in the whole image.
    """

    positions: str = "renumber"

    name: ClassVar[str]
    side: ClassVar[str] = "vision"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    signals: ClassVar[frozenset[Signal]] = frozenset()
    """What the tower has to give besides the features, and what a CLIP's text tower has to."""
    reads_question: ClassVar[bool] = False
    """Whether `choose` looks at what is asked; every question then has its image pruned anew."""
    of_videos: ClassVar[bool] = False
    """Whether it compares the frames of a video, which a model then has to see as one."""
    traced: ClassVar[tuple[str, ...]] = ()
    """Fields, whole numbers below 2**32, that programs get as arguments, uint32 `[]`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _describe_by_docstring(cls)
        jax.tree_util.register_pytree_node(cls, _traced_fields, _with_fields)

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, POSITIONS)
        if self.extra_tokens.number and not self.merges:
            raise UserError(
                f"{type(self).__name__} has extra_tokens, but no merge_tokens that makes them."
            )

    def plan(self) -> Plan:
        return Plan(vision=self)

    @property
    def compares_text(self) -> bool:
        """Whether it goes by what a CLIP's text tower makes of the question."""
        return TEXT_SIMILARITY in self.signals

    @property
    def tower_signals(self) -> frozenset[Signal]:
        """What the vision tower has to give besides the features."""
        return self.signals - {TEXT_SIMILARITY}

    @property
    def merges(self) -> bool:
        """Whether `merge_tokens` makes other tokens of those that are kept."""
        return type(self).merge_tokens is not VisionMethod.merge_tokens

    @property
    def extra_tokens(self) -> ExtraTokens:
        """Tokens that every tile gets besides its kept patches, made by `merge_tokens`."""
        return ExtraTokens()

    def on_model(self, depth: Depth) -> "VisionMethod":
        """The method as it runs on a model, where that decides about its options."""
        return self

    def check(self, num_patches: int) -> None:
        """Raise `UserError` when the method cannot run on images of `num_patches` patches."""

    def fixed_count(self, num_patches: int) -> int | None:
        """How many patches stay of an image of one tile with so many; None where images differ."""
        return None

    def video_count(self, frames: int, patches: int) -> int | None:
        """How many patches stay of a video of so many frames with so many each, or None."""
        return None

    def read(self, question: str) -> str:
        """What it reads of a question, on one line; where it reads questions at all."""
        return question

    def choose(self, patches: Patches) -> Chosen:
        """Which patches stay."""
        raise NotImplementedError

    def merge_tokens(
        self, tiles: VisionOutput, kept: Bool[Array, "F N"], indices: Int[Array, "F K"]
    ) -> Merged:
        """What the kept patches become, tile by tile; a method without it leaves them as they are.

        Args:
            tiles: features and signals of F tiles.
            kept: which patches stay.
            indices: int32, the kept patches and, after them, others.
        """
        raise NotImplementedError


def _describe_by_docstring(cls: Any) -> None:
    """A class without a name or summary of its own has those that its code says."""
    if "name" not in vars(cls):
        cls.name = cls.__name__
    if "summary" not in vars(cls) and cls.__doc__:
        cls.summary = cls.__doc__.strip().splitlines()[0].rstrip(".")


def _traced_fields(method: VisionMethod) -> tuple[tuple[Any, ...], VisionMethod]:
    own = (getattr(method, name) for name in method.traced)
    leaves = tuple(np.uint32(x) if is_whole(x) else x for x in own)  # or whatever stands for it
    return leaves, dataclasses.replace(method, **dict.fromkeys(method.traced, 0))  # type: ignore[arg-type]


def _with_fields(method: VisionMethod, leaves: tuple[Any, ...]) -> VisionMethod:
    method = copy.copy(method)  # not made anew: its checks cannot look at a traced value
    for name, leaf in zip(method.traced, leaves, strict=True):
        object.__setattr__(method, name, leaf)
    return method


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderMethod:
    """Removes tokens at layers inside the decoder, by what it sees of them there.

    The counts are computed on the host and traced; what the program depends on is the
    ranker, the cut and the lengths that the layers get. A method that ranks by the attention
    that tokens receive names a `score`; any other one overrides `rank`, or `keep` where a mask
    says more than a rank.

    Args:
        positions: "original": survivors keep their positions; "renumber": after each cut they
            take 0, 1, 2 ..., so that a layer has positions of its own.
    """

    positions: str = "original"

    name: ClassVar[str]
    side: ClassVar[str] = "decoder"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    cut: ClassVar[str] = BETWEEN_LAYERS
    prune_text: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _describe_by_docstring(cls)

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, POSITIONS)
        check_choice(f"{type(self).__name__}.cut", self.cut, (BETWEEN_LAYERS, AFTER_ATTENTION))
        if self.cut == AFTER_ATTENTION and type(self).recycle is not DecoderMethod.recycle:
            raise UserError(
                f"{type(self).__name__} recycles tokens, but cuts in the middle of a layer, where "
                'there is no new token\'s attention; cut "between_layers".'
            )

    def plan(self) -> Plan:
        return Plan(decoder=self)

    @property
    def score(self) -> Score | None:
        """How candidates are ranked by attention; None where they are not."""
        return None

    @property
    def asks(self) -> tuple[str, ...]:
        """Whose attention it goes by, in words of a score: what costs and memory count."""
        return () if self.score is None else self.score.queries

    @property
    def ranker(self) -> Ranker:
        """What decides at a cut: methods of equal rankers share programs."""
        cls, base = type(self), DecoderMethod
        own = cls.rank is not base.rank or cls.keep is not base.keep
        return self if own else ByAttention(self.score)

    def rank(self, view: LayerView) -> Float[Array, "B S"]:
        """How much each token is worth keeping."""
        raise NotImplementedError

    def keep(
        self, view: LayerView, candidates: Bool[Array, "B S"], count: Int[Array, " B"]
    ) -> Bool[Array, "B S"]:
        """Who stays, as for `ops.cuts.Ranker`: the `count` candidates that rank highest."""
        return keep_best(self.rank(view), candidates, count)

    def recycle(
        self, view: LayerView, dropped: Bool[Array, "B S"], room: Int[Array, " B"]
    ) -> Recycled | None:
        """New tokens that stand for dropped ones, as for `ops.cuts.Ranker`; None: there are none.

        They count as candidates that stay: `keep` has to leave room for them.
        """
        return None

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        """Tokens gone after the cut of each layer, not falling: int `[L]`.

        Args:
            num_tokens: visual tokens of the row that enter the decoder.
            depth: the model's.

        Raises:
            UserError: when the method has no schedule for a model of this depth.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepRates(DecoderMethod):
    """A decoder-side method given by the share of the visual tokens that each layer gets."""

    def rates(self, depth: Depth) -> tuple[float, ...]:
        """The keep rate of each layer, 1 for the first, not increasing: `[L]`."""
        raise NotImplementedError

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        # What layer l + 1 gets is what is left after layer l.
        given = self.rates(depth)
        rates = np.array(given, np.float64)
        if len(rates) != depth.num_hidden_layers:
            raise UserError(
                f"{self.name} has keep rates for {len(rates)} layers, but the decoder has "
                f"{depth.num_hidden_layers}; give one for each, or make some with "
                "`jaxprune calibrate`."
            )
        check_rates(f"The keep rates of {self.name}", given)
        kept = np.floor(rates * num_tokens + 0.5).astype(np.int64)
        return num_tokens - np.append(kept[1:], kept[-1])


def removed_before(
    layers: Sequence[int], left: Sequence[int], num_tokens: int, depth: Depth
) -> np.ndarray:
    """What `DecoderMethod.removed` gives where `left[i]` tokens enter the layer `layers[i]`.

    Raises:
        UserError: for a layer that the decoder does not have.
    """
    removed = np.zeros(depth.num_hidden_layers, np.int64)
    for layer, number in zip(layers, left, strict=True):
        check_depth("cut_layers", layer, depth)
        removed[layer - 1 :] = num_tokens - number
    return removed


def as_layers(layers: Any) -> tuple[int, ...]:
    """The layers before which a method cuts.

    Raises:
        UserError: unless they are whole numbers from 1 up, each larger than the one before.
    """
    listed = tuple(layers) if isinstance(layers, tuple | list) else ()
    rising = all(is_whole(l) for l in listed) and all(a < b for a, b in itertools.pairwise(listed))
    if not listed or not rising or listed[0] < 1:
        raise UserError(f"cut_layers are {layers!r}; expected numbers of layers from 1 up, rising.")
    return listed


def as_shares(name: str, shares: Any, layers: tuple[int, ...]) -> tuple[float, ...]:
    """What is kept before each of `layers`, of what comes there.

    Raises:
        UserError: unless they are as many shares.
    """
    if not isinstance(shares, tuple | list) or len(shares) != len(layers):
        raise UserError(f"{name} are {shares!r}; expected a share for each of the layers {layers}.")
    for share in shares:
        check_share(name, share, zero=True)
    return tuple(map(float, shares))


def check_rates(name: str, rates: Any) -> None:
    """Raise `UserError` unless `rates` start with 1, never increase and stay above 0."""
    numbers = isinstance(rates, tuple | list) and all(is_number(r) for r in rates)
    falling = numbers and all(a >= b for a, b in itertools.pairwise(rates))
    if not falling or not rates or rates[0] != 1 or not rates[-1] >= 0:
        raise UserError(
            f"{name} are {rates!r}; expected one a layer from 1 down to 0, the first one 1, none "
            "larger than the one before."
        )


@functools.lru_cache(maxsize=64)
def removed_table(method: DecoderMethod, depth: Depth, most: int) -> np.ndarray:
    """`method.removed` for every number of visual tokens up to `most`: int `[most + 1, L]`."""
    return np.stack([method.removed(n, depth) for n in range(most + 1)])


def options_of(cls: Any) -> dict[str, "dataclasses.Field[Any]"]:
    """The hyperparameters of a method's class, its own before those that all have."""
    fields = dataclasses.fields(cls)
    return {field.name: field for field in sorted(fields, key=lambda f: f.name == "positions")}


def round_half_up(x: float) -> int:
    """floor(x + 0.5): 0.5 becomes 1, 1.5 becomes 2."""
    return math.floor(x + 0.5)


def check_depth(name: str, layer: int, depth: Depth) -> None:
    """Raise `UserError` unless the model has a layer `layer`, counted from 0."""
    if layer >= depth.num_hidden_layers:
        raise UserError(
            f"{name} is {layer}, but the decoder has {depth.num_hidden_layers} layers, 0 to "
            f"{depth.num_hidden_layers - 1}."
        )


def check_removed(method: DecoderMethod, depth: Depth) -> None:
    """Raise `UserError` for counts that are none, or of tokens of which it is not said which."""
    removed, L = np.asarray(method.removed(64, depth)), depth.num_hidden_layers
    counts = removed.shape == (L,) and np.issubdtype(removed.dtype, np.integer)
    if not counts or (np.diff(removed, prepend=0) < 0).any() or removed[-1] > 64:
        raise UserError(
            f"{type(method).__name__}.removed gives {removed.tolist()} of 64 visual tokens; "
            f"expected whole numbers, one for each of the decoder's {L} layers, which do not fall "
            "and end at 64 or below."
        )
    some = ((removed > 0) & (removed < 64)).any()
    if some and method.ranker == ByAttention(None):
        raise UserError(
            f"{type(method).__name__} keeps some of the tokens, but has neither score nor rank; "
            "give it one, see docs/extending.md."
        )


def check_keep(keep: object) -> None:
    """Raise `UserError` unless `keep` is None or a positive whole number."""
    if keep is not None and (not is_whole(keep) or keep < 1):
        raise UserError(f"keep is {keep!r}; expected a number of visual tokens, 1 or more.")


def check_keep_fits(keep: int | None, num_patches: int) -> None:
    """Raise `UserError` when more patches are to be kept than an image has."""
    if keep is not None and keep > num_patches:
        raise UserError(
            f"keep is {keep}, but an image of this request has {num_patches} patches; that is the "
            "most."
        )


def check_budget(budget: object, published: Iterable[int]) -> None:
    """Raise `UserError` unless a budget is one of those that its authors name."""
    known = tuple(published)
    if budget in known:
        return
    hint = ""
    if is_number(budget):
        hint = f"; the nearest is {min(known, key=lambda one: abs(one - budget))}"
    raise UserError(f"budget is {budget!r}; expected one of: {', '.join(map(str, known))}{hint}.")
