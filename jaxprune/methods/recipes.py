"""Recipes: what calibration found, or a paper published, as small JSON files.

A recipe holds a decoder-side method's options (for iti both stages'), the model they are
for, what was asked and reached, and how they came about. `method="recipe.json"` uses one.

    {
      "schema": 2,
      "method": "fitprune",
      "model": {"made_for": ["llava-1.5-7b"], "num_hidden_layers": 32, "num_image_tokens": 576},
      "cut": "after_attention",
      "score": {"queries": ["visual", "text"], "heads": "max", "later": false},
      "options": {"deletions": [14, 33, ...], "num_tokens": 576},
      "asked": {"save": 0.6},
      "reached": {"save_in_fit": null, "save": 0.597},
      "calibration": {},
      "source": "FitPrune, arXiv 2409.10197, ..."
    }
"""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

from jaxprune.errors import UserError
from jaxprune.files import as_path, read_json, whole_file
from jaxprune.ops.cuts import Depth

SCHEMA = 2
_FINGERPRINT = re.compile("[0-9a-f]{12}")  # of `models.registry`; tells a reader nothing
PUBLISHED = pathlib.Path(__file__).parents[1] / "assets" / "recipes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe.

    Attributes:
        method: the name of the method.
        model: "made_for", the presets or fingerprints (see `models.registry`) of the models
            that it is for, "num_hidden_layers" and "num_image_tokens".
        options: the method's hyperparameters.
        cut, score: the schedule's place and score, for the reader; checked against the method.
        asked, reached: e.g. {"save": 0.6} and what came out, in the fit and after flooring.
        calibration: data, samples, evaluations, seconds: how it was made.
        source: the paper or program that it comes from.
    """

    method: str
    model: dict[str, Any]
    options: dict[str, Any]
    cut: str
    score: dict[str, Any] | None
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)
    reached: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""

    def check_model(self, depth: Depth, *, fractions: bool = False) -> None:
        """Raise `UserError` unless the recipe is for a model.

        Args:
            depth: the model's.
            fractions: take it for another model of the same depth too, its counts as
                fractions of the visual tokens.
        """
        layers = depth.num_hidden_layers
        if layers != self.model["num_hidden_layers"]:
            raise UserError(
                f"The {self.method} recipe is for {self.model['num_hidden_layers']} decoder "
                f"layers, but the model has {layers}; make one with `jaxprune calibrate`."
            )
        if not fractions and not self.fits(depth):
            raise UserError(
                f"The {self.method} recipe was made for another model than this one. Calibrate "
                "it anew, or take it with fractions=True, as shares of the visual tokens."
            )

    def fits(self, depth: Depth) -> bool:
        """Whether the recipe was made for a model."""
        return bool(depth.made_for & set(self.model["made_for"]))


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "model": dict,
    "options": dict,
    "cut": str,
    "score": (dict, type(None)),
    "asked": dict,
    "reached": dict,
    "calibration": dict,
    "source": str,
}
_MODEL_FIELDS: dict[str, type | tuple[type, ...]] = {
    "made_for": list,
    "num_hidden_layers": int,
    "num_image_tokens": int,
}


def load_recipe(path: Any) -> Recipe:
    """A recipe from its file.

    Raises:
        UserError: when it is missing, damaged, of another schema, or lacks a field.
    """
    path = as_path(path, "The recipe")
    if not path.is_file():
        raise UserError(f"The recipe {path} does not exist; expected a JSON file.")
    fields = read_json(path, repair="make it anew")
    schema = fields.pop("schema", None)
    if schema == 1 and isinstance(fields.get("model"), dict):  # knew one fingerprint, or a family
        old = fields["model"]
        family, own = old.pop("family", None), old.pop("fingerprint", None)
        old["made_for"] = [own] if own else {"llava": ["llava-1.5-7b"]}.get(family, [])
    elif schema != SCHEMA:
        raise UserError(f"{path} is no recipe of schema {SCHEMA}; make it anew with this version.")
    _check_fields(fields, _FIELDS, str(path))
    _check_fields(fields["model"], _MODEL_FIELDS, f"{path}, model")
    return Recipe(**fields)


def _check_fields(
    fields: dict[str, Any], expected: dict[str, type | tuple[type, ...]], where: str
) -> None:
    missing, unknown = set(expected) - set(fields), set(fields) - set(expected)
    if missing or unknown:
        raise UserError(
            f"{where} lacks {sorted(missing)} and has unknown {sorted(unknown)}; expected "
            f"{sorted(expected)}."
        )
    for name, kind in expected.items():
        if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            raise UserError(f"{where} has {name}={fields[name]!r}, of the wrong type.")
        if kind is int and fields[name] < 1:
            raise UserError(f"{where} has {name}={fields[name]!r}; expected 1 or more.")


def save_recipe(recipe: Recipe, path: Any) -> None:
    """Write a recipe; the file appears whole or not at all.

    Raises:
        UserError: when it cannot be written.
    """
    fields = {"schema": SCHEMA, **dataclasses.asdict(recipe)}
    with whole_file(as_path(path, "The recipe")) as file:
        file.write_text(json.dumps(fields, indent=1))


# ---- the published ones


@functools.cache
def published_recipes(method: str) -> tuple[Recipe, ...]:
    """Every recipe of a method that ships."""
    return tuple(load_recipe(path) for path in sorted(PUBLISHED.glob(f"{method}-*.json")))


def published(method: str, depth: Depth, save: float | None = None) -> Recipe:
    """The published recipe for a model, and for `save` where there are several.

    Raises:
        UserError: when there is none; it says what there is.
    """
    fitting = _fitting(method, depth)
    for recipe in fitting:
        if save is None or abs(recipe.asked["save"] - save) < 1e-9:
            return recipe
    known = ", ".join(f"{recipe.asked['save']:g}" for recipe in fitting)
    raise UserError(
        f"No {method} recipe is published that saves {save:g}; there are {known}. Make one with "
        "`jaxprune calibrate`."
    )


def nearest_sigmoid(depth: Depth, keep_rate: float) -> float:
    """The k of the published P-Sigmoid point whose keep rate is nearest.

    Raises:
        UserError: when there is none for a model.
    """
    points = _fitting("psigmoid", depth)
    nearest = min(points, key=lambda recipe: abs(recipe.options["keep_rate"] - keep_rate))
    k: float = nearest.options["k"]
    return k


def _fitting(method: str, depth: Depth) -> list[Recipe]:
    found = [recipe for recipe in published_recipes(method) if recipe.fits(depth)]
    if not found:
        known = {name for recipe in published_recipes(method) for name in recipe.model["made_for"]}
        known = {name for name in known if not _FINGERPRINT.fullmatch(name)}
        raise UserError(
            f"No {method} recipe is published for this model of {depth.num_hidden_layers} decoder "
            f"layers, only for: {', '.join(sorted(known))}. Make one with `jaxprune calibrate`."
        )
    return found
