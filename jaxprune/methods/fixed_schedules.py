"""Decoder-side baselines: schedules that look the same for every model and image.

FastV (arXiv 2403.06764): from layer K = 2 on the share `keep_rate` of the visual tokens.
PyramidDrop (arXiv 2410.17247): four stages of L / 4 layers, each keeping half of the one
    before. The authors rank with the boundary layer's own q and k; here, as everywhere, the
    layer before it ranks.
VTW (arXiv 2405.05803): all visual tokens leave before layer K = L / 2.
FastV and PyramidDrop rank by the attention of the prompt's last token, mean over heads.

`without_rope` of both takes the queries and keys before their rotation for that, as FEATHER
(arXiv 2412.13180) found: the rotation favours what stands near the question, which is the lower
end of the image. The layers' own attention is rotated as ever.
"""

import dataclasses
from typing import ClassVar

from jaxprune.errors import UserError, check_flag, check_layer, check_share, check_whole
from jaxprune.methods.base import KeepRates, check_depth
from jaxprune.ops.cuts import Depth, Score


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastV(KeepRates):
    """Keep a share of the visual tokens from one layer on.

    Args:
        keep_rate: the share.
        layer: the first layer that gets only these.
        without_rope: rank by attention without rotary positions.
    """

    keep_rate: float = 0.5
    layer: int = 2
    without_rope: bool = False

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"
    summary: ClassVar[str] = "keep a share of the visual tokens from layer 2 on"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("keep_rate", self.keep_rate, zero=True)
        check_layer("layer", self.layer)
        check_flag("without_rope", self.without_rope)

    @property
    def score(self) -> Score:
        return Score(queries=("last",), rotated=not self.without_rope)

    def rates(self, depth: Depth) -> tuple[float, ...]:
        check_depth("layer", self.layer, depth)
        return tuple(
            1.0 if l < self.layer else self.keep_rate for l in range(depth.num_hidden_layers)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidDrop(KeepRates):
    """Stages of equal depth, each keeping a share of the one before.

    Args:
        keep_rate: what each stage keeps of the one before.
        stages: how many, the first one whole.
        without_rope: rank by attention without rotary positions.
    """

    keep_rate: float = 0.5
    stages: int = 4
    without_rope: bool = False

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"
    summary: ClassVar[str] = "halve the visual tokens at each quarter of the depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("keep_rate", self.keep_rate, zero=True)
        check_whole("stages", self.stages)
        check_flag("without_rope", self.without_rope)

    @property
    def score(self) -> Score:
        return Score(queries=("last",), rotated=not self.without_rope)

    def rates(self, depth: Depth) -> tuple[float, ...]:
        L = depth.num_hidden_layers
        if self.stages > L:
            raise UserError(f"stages is {self.stages}, but the decoder has {L} layers.")
        return tuple(self.keep_rate ** (l * self.stages // L) for l in range(L))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VTW(KeepRates):
    """All visual tokens leave before one layer.

    Args:
        layer: the first layer without them; None for half of the depth.
    """

    layer: int | None = None

    name: ClassVar[str] = "vtw"
    paper: ClassVar[str] = "VTW, arXiv 2405.05803"
    summary: ClassVar[str] = "all visual tokens leave at half of the depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_layer("layer", self.layer)

    def rates(self, depth: Depth) -> tuple[float, ...]:
        layer = depth.num_hidden_layers // 2 if self.layer is None else self.layer
        check_depth("layer", layer, depth)
        return tuple(float(l < max(layer, 1)) for l in range(depth.num_hidden_layers))
