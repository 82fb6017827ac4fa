"""The pruning methods, one file a paper, and how a user names them.

Two families: vision-side methods shorten an image before the decoder sees it, decoder-side
ones remove tokens at layers inside the decoder. A request may use one of each.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprune.errors import UserError
from jaxprune.methods.base import DecoderMethod, Depth, VisionMethod
from jaxprune.methods.baselines import RandomPlaces, UniformPlaces
from jaxprune.methods.fitprune import FitPrune
from jaxprune.methods.fixed_schedules import VTW, FastV, PyramidDrop
from jaxprune.methods.gsearch import GSearch, PSigmoid
from jaxprune.methods.iti import Interaction, Iti, LongTail
from jaxprune.methods.prumerge import PruMerge, PruMergePlus
from jaxprune.methods.recipes import Recipe, load_recipe
from jaxprune.models.registry import family_name

METHODS: dict[str, type] = {
    cls.name: cls
    for cls in (
        PruMerge, PruMergePlus, Iti, FitPrune, GSearch, PSigmoid,
        FastV, PyramidDrop, VTW, RandomPlaces, UniformPlaces,
    )
}  # fmt: skip
NO_PRUNING = "none"


class Plan(NamedTuple):
    """What a request does before the decoder and inside it; None does nothing."""

    vision: VisionMethod | None = None
    decoder: DecoderMethod | None = None


def depth_of(config: Any) -> Depth:
    """What decoder-side methods have to know of a model."""
    return Depth(family_name(config), config.text_config.num_hidden_layers)


def resolve(method: Any, config: Any, *, fractions: bool = False, **options: Any) -> Plan:
    """What a user wrote, as a plan.

    Args:
        method: a name, an instance, a recipe or its path, None, or a pair of them: one
            vision-side, one decoder-side.
        config: the model's config; recipes are checked against it.
        fractions: take recipes made for another model of the same depth.
        **options: hyperparameters of named methods; those that are None are left out. Beside
            a pair each goes to the method that has it.

    Raises:
        UserError: for an unknown name (with the nearest known one) or option, a pair of one
            family, or a recipe made for another model.
    """
    options = {name: value for name, value in options.items() if value is not None}
    parts = method if isinstance(method, tuple | list) else [method]
    if len(parts) > 2 or not parts:
        raise UserError(f"method is a list of {len(parts)}; expected one method or a pair.")
    classes = [_class_of(part) for part in parts]
    _check_options(parts, classes, options)
    plan = Plan()
    for part, cls in zip(parts, classes, strict=True):
        made = part
        if cls is not None:
            made = _make(cls, {n: v for n, v in options.items() if n in _fields(cls)})
        elif isinstance(part, str | pathlib.Path | Recipe) and part != NO_PRUNING:
            made = _from_recipe(part, config, fractions)
        plan = _add(plan, made)
    if plan.decoder is not None:
        plan.decoder.removed(0, depth_of(config))  # says at once when the depth does not fit
    return plan


def _class_of(part: Any) -> type | None:
    """The class of a named method; None for an instance, a recipe or no pruning."""
    if part is None or part == NO_PRUNING or isinstance(part, Recipe | pathlib.Path):
        return None
    if isinstance(part, VisionMethod | DecoderMethod | Iti):
        return None
    if not isinstance(part, str):
        raise UserError(f"method is a {type(part).__name__}; expected a name or an instance.")
    if part in METHODS:
        return METHODS[part]
    if part.endswith(".json"):
        return None
    known = [NO_PRUNING, *METHODS]
    near = difflib.get_close_matches(part, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"Unknown method {part!r}; known: {', '.join(known)}, or a recipe's path, *.json.{hint}"
    )


# What else `generate` takes, for who misspells it.
_OF_GENERATE = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "stop",
    "buckets",
    "method",
)


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _check_options(
    parts: Sequence[Any], classes: Sequence[type | None], options: dict[str, Any]
) -> None:
    named = [cls for cls in classes if cls is not None]
    unknown = sorted(name for name in options if not any(name in _fields(cls) for cls in named))
    if not unknown:
        return
    listed = ", ".join(unknown)
    near = difflib.get_close_matches(unknown[0], _OF_GENERATE, n=1)
    if near and near[0] != unknown[0]:
        raise UserError(f"There is no option {listed}. Did you mean {near[0]}?")
    if named:
        has = "; ".join(f"{cls.name} has: {', '.join(_fields(cls))}" for cls in named)  # type: ignore[attr-defined]
        raise UserError(f"There is no option {listed}; {has}.")
    if all(part is None or part == NO_PRUNING for part in parts):
        raise UserError(f'The options {listed} need a method; method is "none".')
    raise UserError(
        f"The options {listed} came beside a {type(parts[0]).__name__}; set them on the instance "
        "or in the recipe."
    )


def _make(cls: type, options: dict[str, Any]) -> Any:
    required = [n for n, f in _fields(cls).items() if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        example = "keep=64" if missing[0] == "keep" else f"{missing[0]}=0.25"
        raise UserError(f"{cls.name} needs the option {', '.join(missing)}, e.g. {example}.")  # type: ignore[attr-defined]
    return cls(**options)


def _from_recipe(part: Any, config: Any, fractions: bool) -> Any:
    recipe = part if isinstance(part, Recipe) else load_recipe(part)
    cls = METHODS.get(recipe.method)
    if cls is None or set(recipe.options) - set(_fields(cls)):
        raise UserError(
            f"The recipe is for the method {recipe.method!r} with the options "
            f"{sorted(recipe.options)}, which this version does not know."
        )
    recipe.check_model(config, family=family_name(config), fractions=fractions)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.options.items()}
    made = _make(cls, options)
    decoder = made.decoder if isinstance(made, Iti) else made
    score = None if decoder.score is None else dataclasses.asdict(decoder.score)
    if score is not None:
        score["queries"] = list(score["queries"])
    if recipe.cut != decoder.cut or recipe.score != score:
        raise UserError(
            f"The recipe cuts {recipe.cut!r} by the score {recipe.score}, but {recipe.method} "
            f"with its options cuts {decoder.cut!r} by {score}."
        )
    return made


def _add(plan: Plan, made: Any) -> Plan:
    if made is None or made == NO_PRUNING:
        return plan
    new = Plan(made.vision, made.decoder) if isinstance(made, Iti) else Plan(
        made if isinstance(made, VisionMethod) else None,
        made if isinstance(made, DecoderMethod) else None,
    )  # fmt: skip
    for family, old, add in zip(("vision", "decoder"), plan, new, strict=True):
        if old is not None and add is not None:
            raise UserError(
                f"Both methods of the pair are {family}-side, {old.name} and {add.name}; expected "
                "one vision-side and one decoder-side."
            )
    return Plan(plan.vision or new.vision, plan.decoder or new.decoder)


def describe(cls: Any) -> dict[str, Any]:
    """Name, family, summary, paper and options (with defaults) of a method, for listings."""
    options = {
        name: "required" if field.default is dataclasses.MISSING else field.default
        for name, field in _fields(cls).items()
    }
    return {
        "name": cls.name,
        "family": cls.family,
        "summary": cls.summary,
        "paper": cls.paper,
        "options": options,
    }


__all__ = [
    "METHODS",
    "NO_PRUNING",
    "VTW",
    "DecoderMethod",
    "Depth",
    "FastV",
    "FitPrune",
    "GSearch",
    "Interaction",
    "Iti",
    "LongTail",
    "PSigmoid",
    "Plan",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomPlaces",
    "UniformPlaces",
    "VisionMethod",
    "depth_of",
    "describe",
    "resolve",
]
