"""Recipes: what calibration found, or a paper published, as small JSON files.

A recipe holds a decoder-side method's options (for iti both stages'), the model they are
for, what was asked and reached, and how they came about. `method="recipe.json"` uses one.

    {
      "schema": 1,
      "method": "fitprune",
      "model": {"family": "llava", "num_hidden_layers": 32, "num_image_tokens": 576,
                "fingerprint": null},
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
import hashlib
import json
import pathlib
from typing import Any

from jaxprune.errors import UserError
from jaxprune.files import is_file, read_json

SCHEMA = 1
PUBLISHED = pathlib.Path(__file__).parents[1] / "assets" / "recipes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe.

    Attributes:
        method: the name of the method.
        model: "family", "num_hidden_layers", "num_image_tokens" and "fingerprint" (see
            `fingerprint`; None for a published recipe, which fits every model of its
            family and depth).
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

    def check_model(self, config: Any, *, family: str, fractions: bool = False) -> None:
        """Raise `UserError` unless the recipe is for the model of `config`.

        Args:
            config: the model's config.
            family: its family's name.
            fractions: take it for another model of the same depth too, its counts as
                fractions of the visual tokens.
        """
        layers = config.text_config.num_hidden_layers
        if layers != self.model["num_hidden_layers"]:
            raise UserError(
                f"The {self.method} recipe is for {self.model['num_hidden_layers']} decoder "
                f"layers, but the model has {layers}; make one with `jaxprune calibrate`."
            )
        if fractions:
            return
        made_for = self.model.get("fingerprint")
        same = made_for is None or made_for == fingerprint(config)
        if self.model["family"] != family or not same:
            raise UserError(
                f"The {self.method} recipe was made for another model than this one. Calibrate "
                "it anew, or take it with fractions=True, as shares of the visual tokens."
            )


def fingerprint(config: Any) -> str:
    """12 hex digits of a model's architecture: the same for every dtype and weights."""
    fields = json.dumps(config.to_hf(), sort_keys=True, default=str)
    return hashlib.sha256(fields.encode()).hexdigest()[:12]


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
    "family": str,
    "num_hidden_layers": int,
    "num_image_tokens": int,
    "fingerprint": (str, type(None)),
}


def load_recipe(path: Any) -> Recipe:
    """A recipe from its file.

    Raises:
        UserError: when it is missing, damaged, of another schema, or lacks a field.
    """
    path = pathlib.Path(path).expanduser()
    if not is_file(path):
        raise UserError(f"The recipe {str(path)[:300]} does not exist; expected a JSON file.")
    fields = read_json(path, repair="make it anew")
    if fields.pop("schema", None) != SCHEMA:
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
    target = pathlib.Path(path).expanduser()
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(recipe)}, indent=1))
        partial.replace(target)
    except OSError as error:
        raise UserError(f"Cannot write {target} ({error}).") from None
    finally:
        partial.unlink(missing_ok=True)


# ---- the published ones


@functools.cache
def published_recipes(method: str) -> tuple[Recipe, ...]:
    """Every recipe of a method that ships."""
    return tuple(load_recipe(path) for path in sorted(PUBLISHED.glob(f"{method}-*.json")))


def published(
    method: str, family: str, num_hidden_layers: int, save: float | None = None
) -> Recipe:
    """The published recipe for a model family and depth, and for `save` where there are several.

    Raises:
        UserError: when there is none; it says what there is.
    """
    fitting = _fitting(method, family, num_hidden_layers)
    for recipe in fitting:
        if save is None or abs(recipe.asked["save"] - save) < 1e-9:
            return recipe
    known = ", ".join(f"{recipe.asked['save']:g}" for recipe in fitting)
    raise UserError(
        f"No {method} recipe is published that saves {save:g}; there are {known}. Make one with "
        "`jaxprune calibrate`."
    )


def nearest_sigmoid(family: str, num_hidden_layers: int, keep_rate: float) -> float:
    """The k of the published P-Sigmoid point whose keep rate is nearest.

    Raises:
        UserError: when there is none for a model family and depth.
    """
    points = _fitting("psigmoid", family, num_hidden_layers)
    nearest = min(points, key=lambda recipe: abs(recipe.options["keep_rate"] - keep_rate))
    k: float = nearest.options["k"]
    return k


def _fitting(method: str, family: str, num_hidden_layers: int) -> list[Recipe]:
    found = [
        recipe
        for recipe in published_recipes(method)
        if recipe.model["num_hidden_layers"] == num_hidden_layers
        and recipe.model["family"] == family
    ]
    if not found:
        raise UserError(
            f"No {method} recipe is published for a {family} model of {num_hidden_layers} "
            "decoder layers; make one with `jaxprune calibrate`."
        )
    return found
