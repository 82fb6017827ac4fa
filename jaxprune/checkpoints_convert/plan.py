"""A checkpoint checked against its model, from headers alone."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxprune.checkpoints_convert.files import FLOATS, StoredTensor, stored_tensors
from jaxprune.errors import UserError
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import family_of, table_of
from jaxprune.models.weights import KEEP, KeyTable, Rule, Shape

Shapes = dict[str, jax.ShapeDtypeStruct]
"""A model's parameters by path, "language_model/layers_0/mlp/up_proj/kernel"."""

_SHOWN = 8  # problems of one sort that an error message spells out


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One stored tensor and what it becomes.

    Attributes:
        stored: the tensor.
        rule: its parameters' paths and how they lie in it.
        shapes: the parameters' shapes, in the rule's order.
        config: the model's config.
        change: what becomes of each parameter, by its path, before anything else.
    """

    stored: StoredTensor
    rule: Rule
    shapes: tuple[Shape, ...]
    config: object
    change: Callable[[str, np.ndarray], np.ndarray] | None = None

    def read(self) -> dict[str, np.ndarray]:
        """Its parameters by path, in this library's layout and the stored dtype.

        Raises:
            UserError: when the file ends early or the tensor holds NaN or infinity.
        """
        try:
            array = self.stored.read()
        except Exception as error:  # the readers of several libraries, each with its own types
            raise UserError(
                f"Cannot read {self.stored.key} ({error}); the file is damaged."
            ) from None
        if not _all_finite(array):
            raise UserError(
                f"{self.stored.key} holds NaN or infinity; the checkpoint is damaged, get a sound "
                "one."
            )
        parameters = self.rule.load(array, self.shapes, self.config)
        found = dict(zip(self.rule.paths, parameters, strict=True))
        if self.change is None:
            return found
        return {path: self.change(path, array) for path, array in found.items()}


# The exponent bits of 16-bit floats: all set in NaN and infinity. Much faster than
# converting to a type that the processor computes in.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def _all_finite(array: np.ndarray) -> bool:
    exponent = _EXPONENTS.get(array.dtype.name)
    if exponent is None:
        return bool(np.isfinite(array).all())
    return not bool(((array.view(np.uint16) & exponent) == exponent).any())


_WIDENING = {("float16", "float32"), ("bfloat16", "float32")}


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """An array in another float type.

    Raises:
        UserError: where a number is too large for it.
    """
    if array.dtype == dtype or (array.dtype.name, dtype) in _WIDENING:
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        made = array.astype(dtype)
    if not _all_finite(made):
        most = np.abs(array.astype(np.float64)).max()
        raise UserError(f"{name} holds {most:.4g}, which {dtype} cannot; take bfloat16 or float32.")
    return made


@functools.lru_cache(maxsize=16)
def flat_shapes(config: ModelConfig) -> Shapes:
    """The shapes and dtypes of a model's parameters."""
    shapes: Shapes = flatten_dict(family_of(config).param_shapes(config), sep="/")
    return shapes


def make_plan(
    directory: pathlib.Path,
    config: ModelConfig,
    *extra: pathlib.Path,
    instead: Sequence[StoredTensor] = (),
) -> list[PlannedTensor]:
    """Pair every stored tensor with its parameters, or say everything that does not fit.

    Args:
        directory: where the checkpoint is.
        config: the model's config.
        extra: further directories, for the vision tower of an original-format checkpoint;
            only tensors that the model has and `directory` lacks are taken from them.
        instead: tensors that stand for those in `directory`.

    Raises:
        UserError: as `pair_tensors`.
    """
    table, expected = table_of(config), flat_shapes(config)
    return pair_tensors(directory, table, expected, config, *extra, instead=instead)


def pair_tensors(
    directory: pathlib.Path,
    table: KeyTable,
    expected: Shapes,
    config: object,
    *extra: pathlib.Path,
    instead: Sequence[StoredTensor] = (),
) -> list[PlannedTensor]:
    """As `make_plan`, for whatever has a table and shapes.

    Raises:
        UserError: naming all missing, unknown, doubled and mis-shaped tensors at once.
    """
    plan: dict[str, PlannedTensor] = {}
    unknown: list[str] = []
    doubled: list[str] = []
    misshaped: list[str] = []
    head: StoredTensor | None = None
    given: set[str] = set()
    sources = [(directory, tuple(instead)), (directory, None), *((place, None) for place in extra)]
    for place, tensors in sources:
        for stored in stored_tensors(place) if tensors is None else tensors:
            rule = _rule(table, stored.key, expected)
            if rule is None:
                head = stored if path_of(table, stored.key) in table.words else head
                continue
            if any(path not in expected for path in rule.paths):
                if place == directory:
                    unknown.append(stored.key)
                continue
            if any(path in plan for path in rule.paths):
                if place == directory and not given & set(rule.paths):
                    doubled.append(stored.key)
                continue
            if stored.dtype not in FLOATS:
                raise UserError(
                    f"{place} stores {stored.key} as {stored.dtype}; supported: "
                    f"{', '.join(FLOATS)}. Quantised checkpoints have to be converted first."
                )
            shapes = tuple(expected[path].shape for path in rule.paths)
            shape = rule.stored_shape(shapes)
            if stored.shape != shape:
                misshaped.append(f"{stored.key} is {list(stored.shape)}, expected {list(shape)}")
            plan |= dict.fromkeys(rule.paths, PlannedTensor(stored, rule, shapes, config))
            if tensors is not None:
                given |= set(rule.paths)

    for path in table.words:  # transformers takes either where the two are tied
        if path in expected and path not in plan and head is not None:
            shapes = (expected[path].shape,)
            plan[path] = PlannedTensor(head, table.rule_of_path(path), shapes, config)

    problems = [
        _list_some("missing", _missing(table, plan, expected)),
        _list_some("unknown", unknown),
        _list_some("present twice", doubled),
        _list_some("of another shape", misshaped),
    ]
    if any(problems):
        raise UserError(
            f"The weights in {directory} do not fit its config.json: "
            f"{'; '.join(problem for problem in problems if problem)}. "
            "Check that both are of the same model and fully downloaded."
        )
    by_key = {plan[path].stored.key: plan[path] for path in expected}  # once each
    return list(by_key.values())


def path_of(table: KeyTable, key: str) -> str | None:
    """The parameter that a stored tensor is; None for one that holds several, or none."""
    if "/" in key:  # this library's own format
        return key
    name = table.canonical_key(key)
    rule = None if name is None else table.rule_of_key(name)
    return rule.paths[0] if rule is not None and len(rule.paths) == 1 else None


def _rule(table: KeyTable, key: str, expected: Shapes) -> Rule | None:
    """The rule of a stored key; None for what may be skipped."""
    itself = Rule(key, key, KEEP)
    if "/" in key:  # this library's own format: already named and laid out as parameters
        return itself
    name = table.canonical_key(key)
    if name is None:
        return None
    rule = table.rule_of_key(name)
    if rule is None:
        return itself  # not in `expected`, hence reported as unknown
    if rule.optional and not expected.keys() & set(rule.paths):
        return None
    return rule


def _missing(table: KeyTable, plan: dict[str, PlannedTensor], expected: Shapes) -> list[str]:
    """The keys that a checkpoint lacks; the paths of parameters whose neighbours it has.

    Several parameters may share a tensor in the form that is written, and be stored one by
    one in another form that is read.
    """
    rules = {path: table.rule_of_path(path) for path in expected if path not in plan}
    names = (path if plan.keys() & set(rule.paths) else rule.key for path, rule in rules.items())
    return list(dict.fromkeys(names))


def _list_some(label: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {label} ({shown}{more})"
