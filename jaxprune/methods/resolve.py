"""What a user writes as a method -> a plan: at most one method of each side.

Names, options and their spelling are read off the classes: a method of a user's own needs no
entry anywhere.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxprune.errors import UserError
from jaxprune.methods.base import Method, MethodClass, Plan, check_removed, options_of
from jaxprune.methods.baselines import RandomPlaces, UniformPlaces
from jaxprune.methods.cdpruner import CDPruner
from jaxprune.methods.dart import Dart
from jaxprune.methods.divprune import DivPrune
from jaxprune.methods.evs import EVS
from jaxprune.methods.fastervlm import FasterVLM
from jaxprune.methods.feather import Feather
from jaxprune.methods.fitprune import FitPrune
from jaxprune.methods.fixed_schedules import VTW, FastV, PyramidDrop
from jaxprune.methods.gsearch import GSearch, PSigmoid
from jaxprune.methods.hiprune import HiPrune
from jaxprune.methods.holov import HoloV
from jaxprune.methods.iti import Iti
from jaxprune.methods.mmtok import MMTok
from jaxprune.methods.prumerge import PruMerge, PruMergePlus
from jaxprune.methods.recipes import Recipe, load_recipe
from jaxprune.methods.scope import Scope
from jaxprune.methods.sparsevlm import SparseVLM
from jaxprune.methods.v2drop import V2Drop
from jaxprune.methods.vidcom2 import VidCom2
from jaxprune.methods.visionzip import VisionZip
from jaxprune.methods.vispruner import VisPruner
from jaxprune.ops.cuts import Depth

METHODS: dict[str, MethodClass] = {
    cls.name: cls
    for cls in (
        PruMerge, PruMergePlus, FasterVLM, DivPrune, Scope, VisPruner, HiPrune,
        CDPruner, VisionZip, MMTok, HoloV, EVS, VidCom2, RandomPlaces, UniformPlaces,
        Iti,
        FitPrune, GSearch, PSigmoid, FastV, PyramidDrop, VTW, V2Drop, Dart, Feather,
        SparseVLM,
    )
}  # fmt: skip
NO_PRUNING = "none"


def resolve(
    method: Any,
    depth: Depth,
    /,
    *,
    fractions: bool = False,
    others: Iterable[str] = (),
    **options: Any,
) -> Plan:
    """What a user wrote, as a plan.

    Args:
        method: a name, an instance, a recipe or its path, None, or a pair of them: one
            vision-side, one decoder-side.
        depth: the model's; recipes are checked against it.
        fractions: take recipes made for another model of the same depth.
        others: names that the caller takes besides, for who misspells one.
        **options: hyperparameters of named methods; those that are None are left out. Beside
            a pair each goes to the method that has it.

    Raises:
        UserError: for an unknown name (with the nearest known one) or option, a pair of one
            side, or a recipe made for another model.
    """
    pair = isinstance(method, list | tuple) and not isinstance(method, Plan)
    parts: Sequence[Any] = method if pair else [method]
    if not 1 <= len(parts) <= 2:
        raise UserError(f"method is a list of {len(parts)}; expected one method or a pair.")
    classes = [_class_of(part) for part in parts]
    _check_options(parts, classes, options, others)
    options = {name: value for name, value in options.items() if value is not None}
    plan = Plan()
    for part, cls in zip(parts, classes, strict=True):
        if cls is not None:
            made = _make(cls, {n: v for n, v in options.items() if n in options_of(cls)})
        elif isinstance(part, Method):
            made = part
        elif part is None or part == NO_PRUNING:
            continue
        else:
            made = _from_recipe(part, depth, fractions)
        plan = _join(plan, made.plan())
    if plan.vision is not None:
        plan = plan._replace(vision=plan.vision.on_model(depth))
    if plan.decoder is not None:
        check_removed(plan.decoder, depth)
    return plan


def check_names(method: Any, **options: Any) -> None:
    """Raise `UserError` for an unknown method, recipe or option, whatever the model."""
    parts = method if isinstance(method, list | tuple) else [method]
    classes = [_class_of(part) for part in parts]
    _check_options(parts, classes, options, ())
    for part, cls in zip(parts, classes, strict=True):
        own = {} if cls is None else options_of(cls)
        if cls is not None:
            _make(cls, {n: v for n, v in options.items() if n in own and v is not None})
        elif isinstance(part, str) and part != NO_PRUNING:
            load_recipe(part)


def _class_of(part: Any) -> MethodClass | None:
    """The class of a named method; None for an instance, a recipe or no pruning."""
    if isinstance(part, type) and issubclass(part, Method):
        raise UserError(f"method is the class {part.__name__}; pass an instance, with its options.")
    if part is None or isinstance(part, Method | Recipe | pathlib.Path):
        return None
    if not isinstance(part, str):
        raise UserError(f"method is a {type(part).__name__}; expected a name or an instance.")
    if part in METHODS:
        return METHODS[part]
    if part == NO_PRUNING or part.endswith(".json"):
        return None
    known = [NO_PRUNING, *METHODS]
    spelled = part.lower().replace("+", "_plus")
    near = difflib.get_close_matches(spelled, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if "," in part:
        pair = tuple(name.strip() for name in part.split(","))
        hint = f" A pair is a tuple: {pair!r}."
    raise UserError(
        f"Unknown method {part!r}; known: {', '.join(known)}, or a recipe's path, *.json.{hint}"
    )


def _check_options(
    parts: Sequence[Any],
    classes: Sequence[MethodClass | None],
    options: dict[str, Any],
    others: Iterable[str],
) -> None:
    named = {cls.name: options_of(cls) for cls in classes if cls is not None}
    every = {name for cls in METHODS.values() for name in options_of(cls)}
    options = {name: x for name, x in options.items() if x is not None or name not in every}
    unknown = sorted(name for name in options if not any(name in has for has in named.values()))
    if not unknown:
        return
    listed = ", ".join(unknown)
    near = difflib.get_close_matches(unknown[0], list(others), n=1)
    if near and near[0] != unknown[0]:
        raise UserError(f"There is no option {listed}. Did you mean {near[0]}?")
    if not every & set(unknown) and not named:
        raise UserError(f"There is no argument {listed}, and no method has such an option.")
    if named:
        has = "; ".join(f"{name} has: {', '.join(fields)}" for name, fields in named.items())
        raise UserError(f"There is no option {listed}; {has}.")
    if all(part is None or part == NO_PRUNING for part in parts):
        raise UserError(f'The options {listed} need a method; method is "none".')
    raise UserError(
        f"The options {listed} came beside a {type(parts[0]).__name__}; set them on the instance "
        "or in the recipe."
    )


def _make(cls: MethodClass, options: dict[str, Any]) -> Method:
    required = [n for n, f in options_of(cls).items() if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        example = "keep=64" if missing[0] == "keep" else f"{missing[0]}=0.25"
        raise UserError(f"{cls.name} needs the option {', '.join(missing)}, e.g. {example}.")
    made: Method = cls(**options)
    return made


def _from_recipe(part: Any, depth: Depth, fractions: bool) -> Method:
    recipe = part if isinstance(part, Recipe) else load_recipe(part)
    cls = METHODS.get(recipe.method)
    if cls is None or set(recipe.options) - set(options_of(cls)):
        raise UserError(
            f"The recipe is for the method {recipe.method!r} with the options "
            f"{sorted(recipe.options)}, which this version does not know."
        )
    recipe.check_model(depth, fractions=fractions)
    made = _make(
        cls, {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.options.items()}
    )
    cut, score = described_cut(made)
    if recipe.cut != cut or recipe.score != score:
        raise UserError(
            f"The recipe cuts {recipe.cut!r} by the score {recipe.score}, but {recipe.method} "
            f"with its options cuts {cut!r} by {score}."
        )
    return made


def described_cut(method: Method) -> tuple[str, dict[str, Any] | None]:
    """Where a method's decoder side cuts, and by which score, as recipes have it."""
    decoder = method.plan().decoder
    assert decoder is not None
    if decoder.score is None:
        return decoder.cut, None
    score = {**dataclasses.asdict(decoder.score), "queries": [*decoder.score.queries]}
    if decoder.score.rotated:
        del score["rotated"]  # which recipes do not have that are older than it
    return decoder.cut, score


def _join(plan: Plan, new: Plan) -> Plan:
    for side, old, add in zip(("vision", "decoder"), plan, new, strict=True):
        if old is not None and add is not None:
            raise UserError(
                f"Both methods of the pair are {side}-side, {old.name} and {add.name}; expected "
                "one vision-side and one decoder-side."
            )
    return Plan(plan.vision or new.vision, plan.decoder or new.decoder)


def draws_at_random(method: Any) -> bool:
    """Whether a method is named whose choice follows a seed."""
    parts = method if isinstance(method, tuple | list) else [method]
    named = [METHODS.get(part) for part in parts if isinstance(part, str)]
    return any(cls is not None and "seed" in options_of(cls) for cls in named)


def describe(cls: MethodClass) -> dict[str, Any]:
    """Name, side, summary, paper and options (with defaults) of a method, for listings."""
    options = {
        name: "required" if field.default is dataclasses.MISSING else field.default
        for name, field in options_of(cls).items()
    }
    return {
        "name": cls.name,
        "family": cls.side,
        "summary": cls.summary,
        "paper": cls.paper,
        "options": options,
    }
