"""What decides a training run; written beside its checkpoints, so that it resumes as it began."""

import dataclasses

from jaxprune.errors import (
    UserError,
    check_choice,
    check_flag,
    check_seed,
    check_share,
    check_whole,
    is_number,
)
from jaxprune.methods.resolve import check_names
from jaxprune.methods.written import with_options
from jaxprune.models.llama.config import REMAT

PARTS = ("lora", "projector", "decoder", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A training run; the defaults are those of LLaVA-1.5's LoRA (arXiv 2310.03744).

    Attributes:
        method: what prunes, as the command line takes it: "prumerge_plus:keep=64".
        train: "lora": low-rank adapters of the decoder's layers, and the projector; "projector":
            that alone; "decoder": its layers, embeddings and head in full; "all": both in full.
            The vision tower always rests.
        rank: of the adapters.
        alpha: adapters act times alpha / rank.
        dropout: share of an adapter's inputs that is set to zero, while training.
        learning_rate: the peak, of adapters or of the decoder.
        projector_rate: the peak, of the projector.
        weight_decay: AdamW's.
        warmup: share of the updates until the peak.
        clip: largest norm of an update's gradients; 0 leaves them as they are.
        batch_size: samples of an update.
        micro_batch: samples that go through the model at once.
        epochs: how often the data is gone through.
        steps: updates, instead of epochs.
        seed: of the data's order, the adapters' beginning and dropout.
        remat: what is computed again for the gradients instead of kept: "none"; "dots": all but
            the products with weights; "full": all but each layer's input.
        gather: shorten sequences where the decoder drops tokens; False masks them, None shortens
            them where the method says beforehand how many it drops.
    """

    method: str = "none"
    train: str = "lora"
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    learning_rate: float = 2e-4
    projector_rate: float = 2e-5
    weight_decay: float = 0.0
    warmup: float = 0.03
    clip: float = 1.0
    batch_size: int = 160
    micro_batch: int = 16
    epochs: float = 1.0
    steps: int | None = None
    seed: int = 0
    remat: str = "none"
    gather: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise UserError(
                f"method is a {type(self.method).__name__}; expected a text, e.g. "
                "'prumerge_plus:keep=64'."
            )
        check_names(**with_options(self.method))
        check_choice("train", self.train, PARTS)
        check_choice("remat", self.remat, REMAT)
        for name in ("rank", "batch_size", "micro_batch"):
            check_whole(name, getattr(self, name))
        for name in ("dropout", "warmup"):
            check_share(name, getattr(self, name), zero=True, one=False)
        for name in ("alpha", "learning_rate", "projector_rate", "epochs"):
            _check_above(name, getattr(self, name))
        for name in ("weight_decay", "clip"):
            _check_above(name, getattr(self, name), zero=True)
        if self.batch_size % self.micro_batch:
            raise UserError(
                f"batch_size is {self.batch_size} and micro_batch {self.micro_batch}; expected "
                "a micro_batch that divides it."
            )
        if self.steps is not None:
            check_whole("steps", self.steps)
        if self.gather is not None:
            check_flag("gather", self.gather)
        check_seed(self.seed)


def _check_above(name: str, value: object, *, zero: bool = False) -> None:
    """Raise `UserError` unless `value` is a number above 0, or 0 where that is allowed."""
    if not is_number(value) or value < 0 or (value == 0 and not zero):
        raise UserError(f"{name} is {value!r}; expected a number {'from' if zero else 'above'} 0.")
