"""What a model family is: one typed object, and what its config answers.

The rest of the library asks these questions and no others, so that a new family touches its own
folder and one line of `registry`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from jaxprune.models.weights import KeyTable, Shape
from jaxprune.ops.axes import AnyArray
from jaxprune.ops.cuts import NO_CUTS, Schedule, Tokens
from jaxprune.ops.tiles import Frames, Tiling, VisualSize
from jaxprune.ops.visual import Selection, Signal, VisionOutput

Arrays = dict[str, Any]
"""Nested dicts of arrays: a model's parameters."""

IMAGE_PLACEHOLDER = "<image>"
"""What stands for an image in the prompts that users write, whatever the family."""


@runtime_checkable  # so that the tests can check it
class DecoderSizes(Protocol):
    """What cost, memory and mesh ask of a decoder."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def context_length(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def int8(self) -> bool: ...


@runtime_checkable  # so that the tests can check it
class TowerSizes(Protocol):
    """What shapes, cost, memory and mesh ask of a vision tower."""

    @property
    def tile_size(self) -> int:
        """Pixels along a side of a tile."""

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile, which may be fewer than the tower's patches; CLS apart."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a tile's visual tokens."""

    @property
    def spare_cls(self) -> bool:
        """Whether every tile has a CLS token that could be a visual token and is none."""

    def instead(self, signal: Signal) -> Signal:
        """What the tower gives for a signal: that itself, or what stands in for it."""

    def check(self, signals: frozenset[Signal]) -> None:
        """Raise `UserError` unless the tower can give these signals."""

    def macs(self, tiles: int) -> int:
        """Multiply-adds of encoding so many tiles."""

    def bytes(self, tiles: int) -> tuple[int, int]:
        """About what encoding tiles takes beside the weights: what stays, and a layer at work."""


@runtime_checkable  # so that the tests can check it
class ModelConfig(Protocol):
    """The sizes of a model, and what they mean for images and positions. Frozen, hashable."""

    family: ClassVar[str]
    """config.json's `model_type`."""

    def __hash__(self) -> int: ...

    @property
    def text_config(self) -> DecoderSizes: ...
    @property
    def tower(self) -> TowerSizes: ...
    @property
    def image_token_index(self) -> int: ...
    @property
    def dtype(self) -> str: ...

    @property
    def one_tile(self) -> bool:
        """Whether every image is a single tile, and so has as many tokens as any other."""

    @property
    def most_tiles(self) -> int:
        """Tiles of the image that has the most of them."""

    @property
    def fewest_tiles(self) -> int:
        """Tiles of the image that has the fewest of them."""

    @property
    def fewest_tokens(self) -> int:
        """Visual tokens of the image that has the fewest of them, before pruning."""

    @property
    def position_axes(self) -> tuple[int, ...]:
        """(A,) where rotary positions have A axes, () for the usual one."""

    def most_tokens(self, tiles: int) -> int:
        """The most visual tokens that an image of up to so many tiles has before pruning."""

    def tiling(self, size: VisualSize) -> Tiling:
        """How an image is cut into tiles, and what stands where among its visual tokens.

        Raises:
            UserError: for an image that cannot be cut.
        """

    def mesh_splits(self) -> Mapping[str, int]:
        """What a mesh's "model" axis has to divide, by the names that an error gives them."""

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "ModelConfig": ...

    def to_hf(self) -> dict[str, Any]: ...


class LayerCache(NamedTuple):
    """One layer's keys and values: the prompt's, which only prefill writes, and the answer's.

    Attributes:
        k: `[B * J, S, d]`, rotated, of the prompt's S slots. One axis for rows and key/value
            heads is what a batched product takes: with two, XLA on a CPU copies the cache at
            every step. On a device mesh it is two, `[B, J, S, d]`, each on its own axis.
        v: as `k`.
        valid: bool `[B, S]`, slots of the prompt in use.
        new_k, new_v: the same of M generated tokens; every row's token i is in slot i.
        shift: int32 `[B]`, how much lower positions are in this layer than in the prompt, where
            a schedule renumbers them; else None.
    """

    k: Float[Array, "..."]
    v: Float[Array, "..."]
    valid: Bool[Array, "B S"]
    new_k: Float[Array, "..."]
    new_v: Float[Array, "..."]
    shift: Int[Array, " B"] | None


class Prefilled(NamedTuple):
    """A prompt after the last layer.

    Attributes:
        tokens: what is left of it; `x` is `[B, S', D]`, before the last norm.
        caches: one a layer, of what entered its attention.
        records: for each layer that drops tokens, what `schedule.record` noted after it.
    """

    tokens: Tokens
    caches: tuple[LayerCache, ...]
    records: tuple[tuple[Array, ...], ...]


class Embedded(NamedTuple):
    """Where every token of a batch goes: what `Family.embed` needs of a layout.

    Attributes:
        token_ids: int32 `[B, S]`; what stands at a visual slot does not matter.
        visual_index: int32 `[B, S]`: which of the batch's `I * K` visual tokens a slot takes,
            or -1 for a text token.
        kind: int32 `[B, S]`, what a token is to a schedule: see `ops.cuts`.
        positions: int32 `[B, S]`, or `[A, B, S]` with several axes; of a visual token its
            image's first one.
        lengths: int32 `[B]`: slots in use, from the left.
    """

    token_ids: Int[AnyArray, "B S"]
    visual_index: Int[AnyArray, "B S"]
    kind: Int[AnyArray, "B S"]
    positions: Int[AnyArray, "*A B S"]
    lengths: Int[AnyArray, " B"]


def is_original(config: Any) -> bool:
    """Whether a model came in its publisher's form, where no token stands for an image."""
    index: int = config.image_token_index
    return index < 0


NO_IMAGE_TOKEN = -200
"""The `image_token_index` of a model in its publisher's form."""


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model's directory, as a family reads a config from it.

    Attributes:
        path: the directory.
        fields: of its config.json.
        dtype: of the parameters.
        shapes: gives the stored tensors' shapes by their keys.
        vision_tower: the directory of the vision tower, where the user named one.
    """

    path: pathlib.Path
    fields: Mapping[str, Any]
    dtype: str
    shapes: Callable[[], Mapping[str, Shape]] = dict
    vision_tower: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class VideoForm:
    """How a family sees videos.

    Attributes:
        numbers: of how many frames a video has, the numbers of those that are seen.
        text: where frames are images of one tile each: what is written in front of one, with
            its number as `{i}`; None: a video is seen as one.
    """

    numbers: Callable[[int], list[int]]
    text: str | None = None


@runtime_checkable  # so that the tests can check it
class PromptFormat(Protocol):
    """How a family writes its prompts, where a model's directory does not say."""

    @property
    def around_images(self) -> tuple[str, str]:
        """Text in front of each image's tokens and after them."""

    @property
    def image_token(self) -> str:
        """What the templates of directories write for an image."""

    @property
    def video_token(self) -> str:
        """What they write for a video that is seen as one."""

    def template(
        self, fields: Mapping[str, Any], *, original: bool, end: str, vocabulary: Container[str]
    ) -> str | None:
        """The chat template, in Jinja, of a model whose directory has none.

        None where models of the family have several formats and nothing says which.

        Args:
            fields: of its config.json.
            original: whether the directory is in its publisher's form.
            end: the tokenizer's end of an answer.
            vocabulary: of the tokenizer.
        """

    def end(self, fields: Mapping[str, Any]) -> str | None:
        """The token that ends an answer in the publisher's form; None: as the directory says."""


@runtime_checkable  # so that the tests can check it
class Family(Protocol):
    """A model family: its config class, its files and its stages as pure functions.

    `config` is the model's, `params` its nested dict of arrays; nothing here is jitted.
    """

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> type[ModelConfig]: ...
    @property
    def presets(self) -> Mapping[str, Any]:
        """Functions of `dtype` that give the configs of published sizes, by name."""

    @property
    def prompts(self) -> PromptFormat: ...
    @property
    def videos(self) -> VideoForm | None:
        """How videos are seen; None: they are not."""

    def recognises(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this family, in whatever form."""

    def read_config(self, files: ModelFiles) -> ModelConfig:
        """The config of a directory that is of this family.

        Raises:
            UserError: for what this port does not handle.
        """

    def weights(self, config: Any) -> KeyTable:
        """How a model's weights are stored, in the form in which they are written."""

    def encode(
        self,
        params: Arrays,
        config: Any,
        pixel_values: Float[Array, "F H W 3"],
        signals: frozenset[Signal] = frozenset(),
        frames: Frames | None = None,
    ) -> VisionOutput:
        """Pixels of tiles -> features and the signals asked for.

        Args:
            params, config: the model's.
            pixel_values: normalised.
            signals: what methods ask for.
            frames: which tiles are a video's; None: none is.
        """

    def project(
        self, params: Arrays, config: Any, features: Float[Array, "*any C"]
    ) -> Float[Array, "*any D"]:
        """Features -> the decoder's width."""

    def visual_embeddings(
        self, params: Arrays, config: Any, selection: Selection
    ) -> Float[Array, "I K D"]:
        """The selected visual tokens as the decoder takes them."""

    def embed_text(
        self, params: Arrays, config: Any, token_ids: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """Token ids -> the decoder's embeddings."""

    def embed(
        self, params: Arrays, config: Any, layout: Embedded, selection: Selection | None
    ) -> Tokens:
        """Text embeddings with the visual ones laid in where the images stand."""

    def prefill(
        self,
        params: Arrays,
        config: Any,
        tokens: Tokens,
        *,
        new_slots: int,
        schedule: Schedule = NO_CUTS,
        counts: Any = None,
    ) -> Prefilled:
        """A whole prompt through all layers, dropping tokens as a schedule says."""

    def logits(
        self, params: Arrays, config: Any, hidden_states: Float[Array, "*any D"]
    ) -> Float[Array, "*any V"]:
        """Hidden states of the last layer -> float32 logits."""

    def decode(
        self,
        params: Arrays,
        config: Any,
        token_ids: Int[Array, " B"],
        positions: Int[Array, " B"],
        caches: tuple[LayerCache, ...],
        slot: Int[Array, ""],
        seen: Bool[Array, "B M"],
    ) -> tuple[Float[Array, "B V"], tuple[LayerCache, ...]]:
        """One generated token a row: logits for the next one, and the caches.

        Args:
            params, config: the model's.
            token_ids: the tokens.
            positions: where they go.
            caches: one a layer.
            slot: of the generated tokens, in which all rows' are put.
            seen: which of the slots before each row's token sees; itself it sees anyway.
        """

    def init_params(self, config: Any, key: Array) -> Arrays:
        """Random parameters, for training from scratch and for tests."""

    def param_shapes(self, config: Any) -> Arrays:
        """The parameters' shapes and dtypes, without any memory."""

    def image_processor(self, config: Any, *, pad: bool) -> Any:
        """The `transformers` image processor of a model whose directory has no file for it."""

    def image_arguments(self, config: Any, size: VisualSize) -> dict[str, Any]:
        """What the image processor is told of an image beside what its file says."""

    def processor_files(self, config: Any, *, do_pad: bool = False) -> dict[str, dict[str, Any]]:
        """The files from which `transformers` makes the processor: names, and JSON contents."""

    def hub_form(self, config: Any) -> bool:
        """Whether `transformers` knows a form of the model, in which it is written."""
