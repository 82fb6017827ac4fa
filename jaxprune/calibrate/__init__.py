"""From calibration samples to a recipe: FitPrune's fit, G-Search, P-Sigmoid, iti's constant.

evaluate.py   samples through the decoder in mask mode: one program per batch shape
fitprune.py   FitPrune's fit
search.py     G-Search, P-Sigmoid, iti's c: functions of a score, without any model
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibrate import fitprune, search
from jaxprune.calibrate.evaluate import METRICS, Batch, CalibrationSet, encode_samples, score
from jaxprune.calibrate.progress_file import ProgressFile
from jaxprune.data.samples import DEFAULT_SAMPLES, Sample, read_samples, scene_samples
from jaxprune.engine.cost import most_tokens
from jaxprune.errors import UserError, check_choice, check_share, check_whole, is_number, is_whole
from jaxprune.methods import FitPrune, GSearch, Iti, PSigmoid
from jaxprune.methods.base import round_half_up
from jaxprune.methods.gsearch import check_queries
from jaxprune.methods.iti import tail_start
from jaxprune.methods.recipes import Recipe
from jaxprune.methods.resolve import described_cut
from jaxprune.model import Params, digest, weights_digest
from jaxprune.models.registry import depth_of, fingerprint
from jaxprune.ops.ranking import descending_order, ranks
from jaxprune.ops.visual import CLS_ATTENTION

CALIBRATED = ("fitprune", "gsearch", "psigmoid", "iti")
SEARCHES = ("bisection", "bayesian")
Fitted = FitPrune | GSearch | PSigmoid | Iti
TOLERANCES = {"accuracy": 0.005, "logprob": 0.02}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to calibrate; what a method does not use does not matter to it.

    Attributes:
        method: "fitprune", "gsearch", "psigmoid" or "iti".
        save: fitprune: share of the visual tokens' FLOPs to save.
        keep_rate: psigmoid: mean keep rate over layers; iti: share of tokens left by both
            stages together.
        tolerance: gsearch: how much the score may fall; None for 0.005 (accuracy) or 0.02
            nats an answer token (logprob).
        metric: "accuracy" (exact match, teacher-forced) or "logprob"; what gsearch and
            psigmoid go by.
        search: gsearch: "bisection" on multiples of 1/64, or "bayesian".
        weight: gsearch, bayesian: what a keep rate of 1 costs in score (the paper's lambda).
        evaluations: bayesian searches: of the score, in each layer for gsearch.
        first_pruned_layer, queries: gsearch and psigmoid: see their methods.
        stage2: iti: what its second stage removes of the visual tokens left.
        batch_size: samples at once.
        seed: of the Bayesian searches.
    """

    method: str
    save: float | None = None
    keep_rate: float | None = None
    tolerance: float | None = None
    metric: str = "accuracy"
    search: str = "bisection"
    weight: float = 0.1
    evaluations: int = 24
    first_pruned_layer: int = 2
    queries: str = "text"
    stage2: float = 0.5
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in CALIBRATED:
            raise UserError(
                f"method is {self.method!r}; what can be calibrated: {', '.join(CALIBRATED)}."
            )
        needed = {"fitprune": "save", "psigmoid": "keep_rate", "iti": "keep_rate"}.get(self.method)
        if needed:
            if getattr(self, needed) is None:
                raise UserError(f"Calibrating {self.method} needs {needed}.")
            check_share(needed, getattr(self, needed), one=False)
        for name in {"save", "keep_rate", "tolerance"} - {needed}:
            wanted = name == "tolerance" and self.method == "gsearch"
            if getattr(self, name) is not None and not wanted:
                raise UserError(f"{self.method} has no {name} to calibrate.")
        check_choice("metric", self.metric, METRICS)
        check_choice("search", self.search, SEARCHES)
        if self.tolerance is not None and not (is_number(self.tolerance) and self.tolerance >= 0):
            raise UserError(f"tolerance is {self.tolerance!r}; expected 0 or more.")
        check_queries(self.queries)
        check_share("stage2", self.stage2, zero=True)
        if not is_number(self.weight) or self.weight < 0:
            raise UserError(f"weight is {self.weight!r}; expected a number, 0 or more.")
        if not is_whole(self.seed) or not 0 <= self.seed < 2**31:
            raise UserError(f"seed is {self.seed!r}; expected a whole number from 0 to 2^31 - 1.")
        for name in ("evaluations", "first_pruned_layer", "batch_size"):
            check_whole(name, getattr(self, name))


def calibrate(
    params: Params,
    samples: Sequence[Sample] | Any = None,
    *,
    progress_file: Any = None,
    show_progress: bool | None = None,
    **settings: Any,
) -> Recipe:
    """Fit a decoder-side method to a model on calibration samples.

    Args:
        params: what `jaxprune.load` gives.
        samples: a list of `Sample`, the path of a JSONL file with "image", "question" and
            "answer", or None for drawn scenes.
        progress_file: where evaluations are kept as they are done, so that an interrupted
            search resumes; removed at the end.
        show_progress: a bar on stderr; None shows it in a terminal.
        **settings: see `Settings`.

    Returns:
        The recipe; `save_recipe` writes it, `method=recipe` uses it.

    Raises:
        UserError: for settings or samples that do not work, or a target out of reach.
    """
    try:
        chosen = Settings(**settings)
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(Settings))
        raise UserError(f"{error}; the settings are: {known}.") from None
    if not isinstance(params, Params):
        raise UserError(f"params is a {type(params).__name__}; expected what jaxprune.load gives.")
    source = "drawn scenes, calibration split, seed 0"
    if samples is None:
        samples = scene_samples()
    elif isinstance(samples, str | pathlib.Path):
        source, samples = str(samples), read_samples(samples)
    else:
        source = "samples"
    if chosen.method == "iti":
        stage2 = Iti(stage2=chosen.stage2).plan().decoder
        assert stage2 is not None
        stage2.removed(0, depth_of(params.config))
    began = time.perf_counter()
    signals = frozenset({CLS_ATTENTION}) if chosen.method == "iti" else frozenset()
    data = encode_samples(
        params,
        samples,
        batch_size=chosen.batch_size,
        signals=signals,
        with_answers=chosen.method in ("gsearch", "psigmoid"),
        show_progress=show_progress,
    )
    identity = {
        "settings": dataclasses.asdict(chosen),
        "model": fingerprint(params.config),
        "weights": weights_digest(params),
        "samples": digest(
            *(x for batch in data.batches for x in _contents(batch)),
        ),
    }
    with ProgressFile(progress_file, identity, label=chosen.method, show=show_progress) as memory:
        method, report = _FITS[chosen.method](data, chosen, memory)
        report["evaluations"] = memory.asked
    report["seconds"] = round(time.perf_counter() - began, 2)
    report |= {"samples": data.samples, "data": source}
    cut, score_of_cut = described_cut(method)
    config = params.config
    return Recipe(
        method=method.name,
        model={
            "made_for": [fingerprint(config)],
            "num_hidden_layers": config.text_config.num_hidden_layers,
            "num_image_tokens": most_tokens(config),
        },
        options={
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(method).items()
            if value is not None
        },
        cut=cut,
        score=score_of_cut,
        asked={
            name: getattr(chosen, name)
            for name in ("save", "keep_rate", "tolerance")
            if getattr(chosen, name) is not None
        },
        reached=report.pop("reached"),
        calibration=report,
        source="jaxprune calibrate",
    )


def _contents(batch: Batch) -> tuple[np.ndarray, ...]:
    """What samples are made of: images, answers, questions."""
    embedded, selection = batch.prompt.layout.embedded, batch.seen.selection
    assert selection is not None
    tokens = np.asarray(selection.tokens)[: batch.rows]
    answers = batch.answers[: batch.rows]
    return tokens, answers, np.asarray(embedded.token_ids), np.asarray(embedded.kind)


def _fit_fitprune(
    data: CalibrationSet, chosen: Settings, memory: ProgressFile
) -> tuple[Fitted, dict[str, Any]]:
    assert chosen.save is not None
    memory.expect(8)
    return fitprune.fit(data, save=chosen.save, remember=memory.remember)


def _rate_score(data: CalibrationSet, chosen: Settings, memory: ProgressFile) -> Any:
    """The score of keep rates, remembered by the counts that they lead to."""

    def of(rates: search.Rates) -> float:
        method = GSearch(keep_rates=rates, queries=chosen.queries)
        most = int(data.visual_tokens.max())
        kept = most - method.removed(most, data.engine.depth)
        value: float = memory.remember(
            " ".join(map(str, kept)), lambda: score(data, method, chosen.metric)
        )
        return value

    return of


def _fit_gsearch(
    data: CalibrationSet, chosen: Settings, memory: ProgressFile
) -> tuple[Fitted, dict[str, Any]]:
    L = data.engine.depth.num_hidden_layers
    first = chosen.first_pruned_layer
    if first >= L:
        raise UserError(f"first_pruned_layer is {first}, but the decoder has {L} layers.")
    tolerance = TOLERANCES[chosen.metric] if chosen.tolerance is None else chosen.tolerance
    of = _rate_score(data, chosen, memory)
    if chosen.search == "bisection":
        memory.expect(1 + (L - first) * 6)
        rates = search.greedy_search(
            of, num_hidden_layers=L, first_pruned_layer=first, tolerance=tolerance
        )
    else:
        memory.expect((L - first) * chosen.evaluations)
        rates = search.bayesian_greedy_search(
            of,
            num_hidden_layers=L,
            first_pruned_layer=first,
            weight=chosen.weight,
            evaluations=chosen.evaluations,
            seed=chosen.seed,
        )
    report: dict[str, Any] = {
        "metric": chosen.metric,
        "search": chosen.search,
        "reached": {
            "keep_rate": round(search.mean_rate(rates), 6),
            "score": of(rates),
            "unpruned_score": of((1.0,) * L),
        },
    }
    if chosen.search == "bisection":
        report["tolerance"] = tolerance
    return GSearch(keep_rates=rates, queries=chosen.queries), report


def _fit_psigmoid(
    data: CalibrationSet, chosen: Settings, memory: ProgressFile
) -> tuple[Fitted, dict[str, Any]]:
    assert chosen.keep_rate is not None
    depth = data.engine.depth
    of = _rate_score(data, chosen, memory)

    def with_k(k: float) -> PSigmoid:
        return PSigmoid(
            keep_rate=chosen.keep_rate,  # type: ignore[arg-type]
            k=k,
            first_pruned_layer=chosen.first_pruned_layer,
            queries=chosen.queries,
        )

    memory.expect(chosen.evaluations)
    k = search.maximise(
        lambda k: of(with_k(k).rates(depth)), 0.05, 2.0,
        evaluations=chosen.evaluations, seed=chosen.seed,
    )  # fmt: skip
    rates = with_k(k).rates(depth)
    return with_k(k), {
        "metric": chosen.metric,
        "rates": [round(rate, 6) for rate in rates],
        "reached": {
            "keep_rate": round(search.mean_rate(rates), 6),
            "score": of(rates),
            "unpruned_score": of((1.0,) * depth.num_hidden_layers),
        },
    }


def _fit_iti(
    data: CalibrationSet, chosen: Settings, memory: ProgressFile
) -> tuple[Fitted, dict[str, Any]]:
    assert chosen.keep_rate is not None
    curves = [
        (batch.patches.signals[CLS_ATTENTION][: batch.rows], batch.patches.place[: batch.rows])
        for batch in data.batches
    ]

    @jax.jit
    def before_tail(s: jax.Array, place: jax.Array, c: jax.Array) -> jax.Array:
        kept = ranks(descending_order(s)) < tail_start(s, c)[..., None]
        return jnp.sum(kept & (place >= 0), axis=(1, 2))

    patches = np.concatenate([(place >= 0).sum(axis=(1, 2)) for _, place in curves])

    def counts(c: float) -> np.ndarray:
        return np.concatenate([np.asarray(before_tail(*curve, np.float32(c))) for curve in curves])

    def share(c: float) -> float:
        stage1 = counts(c)
        removed = np.array([round_half_up(chosen.stage2 * int(n)) for n in stage1])
        return float(np.mean((stage1 - removed) / patches))

    c, reached = search.tail_exponent(share, chosen.keep_rate)
    return Iti(c=c, stage2=chosen.stage2), {
        "reached": {
            "keep_rate": round(reached, 6),
            "stage1_keep_rate": round(float(np.mean(counts(c) / patches)), 6),
        }
    }


_FITS = {
    "fitprune": _fit_fitprune,
    "gsearch": _fit_gsearch,
    "psigmoid": _fit_psigmoid,
    "iti": _fit_iti,
}

__all__ = [
    "CALIBRATED",
    "DEFAULT_SAMPLES",
    "Sample",
    "Settings",
    "calibrate",
    "encode_samples",
    "read_samples",
    "scene_samples",
    "score",
]
