"""A checkpoint checked against its model, from headers alone."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from jaxprune.checkpoints_convert.files import FLOATS, StoredTensor, stored_tensors
from jaxprune.checkpoints_convert.keys import canonical_key
from jaxprune.checkpoints_convert.tables import KEEP, Transform, key_of, path_of
from jaxprune.errors import UserError
from jaxprune.models.registry import family, family_name

_SHOWN = 8  # problems of one sort that an error message spells out


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One stored tensor and the parameter that it becomes."""

    stored: StoredTensor
    path: str
    transform: Transform

    def read(self) -> np.ndarray:
        """The parameter in this library's layout and the stored dtype.

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
        return self.transform.load(array)


Plan = list[PlannedTensor]

# The exponent bits of 16-bit floats: all set in NaN and infinity. Much faster than
# converting to a type that the processor computes in.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def _all_finite(array: np.ndarray) -> bool:
    exponent = _EXPONENTS.get(array.dtype.name)
    if exponent is None:
        return bool(np.isfinite(array).all())
    return not bool(((array.view(np.uint16) & exponent) == exponent).any())


@functools.lru_cache(maxsize=16)
def flat_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's parameters by path, "language_model/layers_0/mlp/up_proj/kernel"."""
    return flatten(family(config).param_shapes(config))


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """A nested dict -> {path: leaf}."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(entry.key for entry in path): leaf for path, leaf in pairs}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """{path: leaf} -> a nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def make_plan(directory: pathlib.Path, config: Any, *extra: pathlib.Path) -> Plan:
    """Pair every stored tensor with its parameter, or say everything that does not fit.

    Args:
        directory: where the checkpoint is.
        config: the model's config.
        extra: further directories, for the vision tower of an original-format checkpoint;
            only tensors that the model has and `directory` lacks are taken from them.

    Raises:
        UserError: naming all missing, unknown, doubled and mis-shaped tensors at once.
    """
    table = family_name(config)
    expected = flat_shapes(config)
    plan: dict[str, PlannedTensor] = {}
    unknown, doubled, misshaped = [], [], []
    for place in (directory, *extra):
        for stored in stored_tensors(place):
            found = _target(table, stored.key, expected)
            if found is None:
                continue
            path, transform = found
            if path not in expected:
                if place == directory:
                    unknown.append(stored.key)
                continue
            if path in plan:
                if place == directory:
                    doubled.append(stored.key)
                continue
            if stored.dtype not in FLOATS:
                raise UserError(
                    f"{place} stores {stored.key} as {stored.dtype}; supported: "
                    f"{', '.join(FLOATS)}. Quantised checkpoints have to be converted first."
                )
            shape = stored_shape(transform, expected[path].shape)
            if stored.shape != shape:
                misshaped.append(f"{stored.key} is {list(stored.shape)}, expected {list(shape)}")
            plan[path] = PlannedTensor(stored, path, transform)

    missing = [key_of(table, path)[0] for path in expected if path not in plan]
    problems = [
        _list_some("missing", missing),
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
    return [plan[path] for path in expected]


def _target(table: str, key: str, expected: dict) -> tuple[str, Transform] | None:
    """Path and transform of a stored key; None for what may be skipped."""
    if "/" in key:  # this library's own format: already named and laid out as parameters
        return key, KEEP
    name = canonical_key(key)
    if name is None:
        return None
    found = path_of(table, name)
    if found is None:
        return key, KEEP  # not in `expected`, hence reported as unknown
    if found[0] == "language_model/lm_head/kernel" and found[0] not in expected:
        return None  # tied embeddings: transformers ignores a stored head too
    return found


def stored_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape on disk of a parameter of `shape`, without memory for either."""
    blank = np.broadcast_to(np.zeros((), np.int8), shape)
    return transform.export(blank).shape


def _list_some(label: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {label} ({shown}{more})"
