"""MMTok: the patches that cover both the question and the image (arXiv 2508.18264).

With v the N visual tokens as the projector gives them, v' as it takes them, and t the question's
tokens in the decoder's input embeddings, all of length one:

    text            T_ij = softmax over j of t_i . v_j / tau_text
    vision          V_ij = softmax over j of v'_i . v'_j / tau_vision
    what S covers   f(S) = mean_i max_{j in S} T_ij + weight mean_i max_{j in S} V_ij

`keep` times the patch that adds the most to f joins S. They stay in raster order; nothing is
merged. The paper has tau_text 0.02 (0.01 on Qwen2.5-VL), tau_vision 0.2 and weight 0.5, and
published no code.

The question is what the user says in the last turn, without line breaks or the template's words;
with `chat=False` it is the prompt as it stands. Without any, the image term alone decides (ours).
On images of several tiles the paper keeps the same share of every tile, for which
`budget="tile"` is there; by default all tiles are one set.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.errors import UserError, is_number
from jaxprune.methods.counted import Counted, Group
from jaxprune.ops.greedy import cosines, greedy, unit
from jaxprune.ops.visual import FEATURES, PROJECTED, Signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMTok(Counted):
    """Keep the patches that cover the question and the image.

    Args:
        tau_text: temperature of what covers the question.
        tau_vision: temperature of what covers the image.
        weight: of the image beside the question.
    """

    tau_text: float = 0.02
    tau_vision: float = 0.2
    weight: float = 0.5

    name: ClassVar[str] = "mmtok"
    paper: ClassVar[str] = "MMTok, arXiv 2508.18264"
    summary: ClassVar[str] = "keep the patches that cover the question and the image"
    signals: ClassVar[frozenset[Signal]] = frozenset({FEATURES, PROJECTED})
    reads_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau_text", "tau_vision"):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected a number above 0.")
        if not is_number(self.weight) or self.weight < 0:
            raise UserError(f"weight is {self.weight!r}; expected a number, 0 or more.")

    def among(self, group: Group) -> Bool[Array, " P"]:
        assert group.questions is not None
        words, asked = group.questions
        # A rounded product would decide who is chosen.
        text = jnp.matmul(
            unit(words), unit(group.signals[PROJECTED]).T, precision=jax.lax.Precision.HIGHEST
        )
        vision = cosines(group.signals[FEATURES])
        covers = jnp.concatenate([text / self.tau_text, vision / self.tau_vision])  # [Q + P, P]
        covers = jax.nn.softmax(jnp.where(group.inside, covers, -jnp.inf), axis=1)
        weights = jnp.concatenate([share_of(asked), self.weight * share_of(group.inside)])
        return greedy(
            self.keep,
            group.inside,
            jnp.zeros(len(covers)),
            gain=lambda covered: jnp.sum(
                weights[:, None] * jnp.maximum(covers - covered[:, None], 0), axis=0
            ),
            update=lambda covered, j: jnp.maximum(covered, covers[:, j]),
        )


def share_of(some: Bool[Array, " n"]) -> Float[Array, " n"]:
    """What each of some counts for in their mean; nothing where there is none."""
    return some / jnp.maximum(jnp.sum(some), 1)
