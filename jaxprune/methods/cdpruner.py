"""CDPruner: the most diverse subset among what the question asks for (arXiv 2506.10967).

With x the visual tokens as the projector gives them, and img_i and txt_m patch i and part m of
the question in the common space of the CLIP whose vision tower it is:

    1.  relevance   rho_i = - mean_m cos(img_i, txt_m)
                    r_i = (rho_i - min rho + 1e-6) / (max rho - min rho), min and max over an image
    2.  kernel      L_ij = r_i cos(x_i, x_j) r_j
    3.  choice      greedily the set S of `keep` patches with the largest det L_S: each time the one
                    that multiplies it by the largest factor,
                        d_i = L_ii - (its part in the span of those chosen before)

They stay in raster order; nothing is merged. The minus is the authors': patches of a CLIP that
show what a text says are less like it than others. img_i is a tower's feature through CLIP's
last norm and projection, as only the CLS token is in CLIP; the question is cut into parts of
CLIP's context, 77 tokens, each read by itself.

CLIP's text tower and the projections are in no LLaVA: `jaxprune.load(..., text_tower=...)` takes
them from the CLIP that a user names.

Options and what they reproduce:
    leave_out   sentences that are no part of the question. By default the one with which LLaVA asks
                for a short answer, as in the published code; () reads the question as it is.
    relevance   "clip": as above. "embeddings", for models without a CLIP (ours): with t_m the
                question's tokens in the decoder's input embeddings, as MMTok compares them,
                rho_i = mean_m cos(x_i, t_m), without the minus, which is for CLIP alone.

Deviations: the published code pools min, max and the parts of the question over a batch; here
every image is by itself, as the published code has it with a batch of one. Where all rho are
equal, r = 1. Over the kernel's numerical rank, where d is at most 1e-6 of the largest L_ii, those
with the largest L_ii come next; the published code gets NaN there and keeps fewer tokens. The
question is all that the user asks last; if nothing is left of it, it is read whole. By default a
number is kept of all tiles together; the published code keeps one of every tile, which is
`budget="tile"`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import UserError, check_choice
from jaxprune.methods.counted import Counted, Group
from jaxprune.ops.greedy import cosines, greedy, unit
from jaxprune.ops.tiles import Chosen, Patches, Questions
from jaxprune.ops.visual import PROJECTED, TEXT_SIMILARITY, Signal

RANK = 1e-6
"""What is smaller than this share of the kernel's largest entry is zero in float32."""
SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA's authors add to questions of benchmarks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CDPruner(Counted):
    """Keep a diverse subset of the patches that the question asks for.

    Args:
        leave_out: sentences that are left out of what is read of a question.
        relevance: by what patches are compared with it, "clip" or "embeddings".
    """

    leave_out: tuple[str, ...] = (SHORT_ANSWER,)
    relevance: str = "clip"

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "CDPruner, arXiv 2506.10967"
    summary: ClassVar[str] = "keep a diverse subset of what the question asks for"
    signals: ClassVar[frozenset[Signal]] = frozenset({PROJECTED, TEXT_SIMILARITY})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ("clip", "embeddings"))
        object.__setattr__(self, "leave_out", as_sentences(self.leave_out))
        by_clip = self.relevance == "clip"
        # The class says what its defaults ask for.
        asked = {PROJECTED, TEXT_SIMILARITY} if by_clip else {PROJECTED}
        object.__setattr__(self, "signals", frozenset(asked))
        object.__setattr__(self, "reads_question", not by_clip)

    def read(self, question: str) -> str:
        left = question
        for sentence in self.leave_out:
            left = left.replace(sentence, " ")
        return " ".join(left.split()) or question

    def choose(self, patches: Patches) -> Chosen:
        if self.relevance == "clip":
            rho = -patches.signals[TEXT_SIMILARITY]
        else:
            assert patches.questions is not None
            rho = likeness(patches.signals[PROJECTED], patches.questions)
        # Relative to the whole image, also where tiles are chosen from apart.
        relevance = relative(rho, patches.place >= 0)
        signals = {**patches.signals, TEXT_SIMILARITY: relevance}
        return super().choose(patches._replace(signals=signals))

    def among(self, group: Group) -> Bool[Array, " P"]:
        r = group.signals[TEXT_SIMILARITY]
        kernel = r[:, None] * cosines(group.signals[PROJECTED]) * r
        return most_diverse(kernel, group.inside, self.keep)


def as_sentences(given: Any) -> tuple[str, ...]:
    """Sentences, each on one line, as questions are read.

    Raises:
        UserError: for anything but texts.
    """
    listed = (given,) if isinstance(given, str) else given
    if not isinstance(listed, tuple | list) or not all(
        isinstance(text, str) and text.strip() for text in listed
    ):
        raise UserError(f"leave_out is {given!r}; expected sentences, or () for none.")
    return tuple(" ".join(text.split()) for text in listed)


def likeness(x: Float[Array, "I T N D"], questions: Questions) -> Float[Array, "I T N"]:
    """Cosine of every patch and the words of its image's question, the mean over them."""
    words, asked = unit(questions.tokens), questions.valid
    mean = jnp.sum(words * asked[..., None], axis=1) / jnp.maximum(asked.sum(axis=1), 1)[:, None]
    # A rounded product would decide who is chosen.
    return jnp.einsum("itnd,id->itn", unit(x), mean, precision=jax.lax.Precision.HIGHEST)


def relative(rho: Float[Array, "I T N"], inside: Bool[Array, "I T N"]) -> Float[Array, "I T N"]:
    """Each image's numbers from about 0 to 1; 1 where all are equal, 0 outside the picture."""
    low = jnp.min(rho, axis=(1, 2), keepdims=True, where=inside, initial=jnp.inf)
    high = jnp.max(rho, axis=(1, 2), keepdims=True, where=inside, initial=-jnp.inf)
    span = high - low
    r = jnp.where(span > 0, (rho - low + 1e-6) / jnp.where(span > 0, span, 1.0), 1.0)
    return jnp.where(inside, r, 0.0)


def most_diverse(
    kernel: Float[Array, "P P"], candidates: Bool[Array, " P"], keep: int
) -> Bool[Array, " P"]:
    """Greedily the candidates whose part of a kernel has the largest determinant."""
    P = len(candidates)
    size = jnp.diagonal(kernel)
    zero = RANK * jnp.max(jnp.where(candidates, size, 0.0))

    # Rows of a Cholesky factor, one for every patch that is chosen, and what is left of L_ii.
    State = tuple[Array, Array, Array]

    def gain(state: State) -> Float[Array, " P"]:
        left, _, _ = state
        return jnp.where(jnp.max(left) > zero, left, size)

    def update(state: State, j: Int[Array, ""]) -> State:
        left, rows, number = state
        part = jnp.matmul(rows[:, j], rows, precision=jax.lax.Precision.HIGHEST)
        sound = left[j] > zero
        row = (kernel[j] - part) / jnp.sqrt(jnp.where(sound, left[j], 1.0))
        row = jnp.where(sound, row, 0.0)
        return (left - row**2).at[j].set(-jnp.inf), rows.at[number].set(row), number + 1

    left = jnp.where(candidates, size, -jnp.inf)
    rows = jnp.zeros((min(keep, P), P), jnp.float32)
    return greedy(keep, candidates, (left, rows, jnp.int32(0)), gain, update)
