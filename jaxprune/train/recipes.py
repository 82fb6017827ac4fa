"""The settings with which papers trained, as files; and a run's settings from one of them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError
from jaxprune.files import as_path, read_json
from jaxprune.train.settings import Settings

PUBLISHED = pathlib.Path(__file__).parents[1] / "assets" / "training"
_FORMAT = "jaxprune training recipe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How a paper trained.

    Attributes:
        name: of the file.
        title: what it reproduces.
        source: the paper, and its code.
        settings: of a run.
        stated: what the source says.
        left_open: what it does not, and what is taken here.
    """

    name: str
    title: str
    source: str
    settings: Settings
    stated: tuple[str, ...]
    left_open: tuple[str, ...]


def published_recipes() -> dict[str, TrainingRecipe]:
    """All that ship, by name."""
    return {path.stem: read_recipe(path) for path in sorted(PUBLISHED.glob("*.json"))}


def read_recipe(named: Any) -> TrainingRecipe:
    """A recipe by the name of one that ships, or from a file.

    Raises:
        UserError: for an unknown name, or a file that holds none.
    """
    path = as_path(named, "The training recipe")
    known = sorted(path.stem for path in PUBLISHED.glob("*.json"))
    if str(named) in known:
        path = PUBLISHED / f"{named}.json"
    elif not path.is_file():
        raise UserError(
            f"There is no training recipe {str(named)!r}; expected a file, or one of: "
            f"{', '.join(known)}."
        )
    fields = read_json(path, repair="name another")
    if fields.pop("format", None) != _FORMAT:
        raise UserError(f"{path} is no training recipe; those say {_FORMAT!r} under 'format'.")
    names = {field.name for field in dataclasses.fields(TrainingRecipe)} - {"name"}
    if set(fields) != names or not isinstance(fields["settings"], dict):
        raise UserError(f"{path} has {', '.join(fields)}; expected {', '.join(sorted(names))}.")
    return TrainingRecipe(
        name=path.stem,
        title=fields["title"],
        source=fields["source"],
        settings=settings_of(None, fields["settings"]),
        stated=tuple(fields["stated"]),
        left_open=tuple(fields["left_open"]),
    )


def settings_of(recipe: Any, given: Mapping[str, Any]) -> Settings:
    """A run's settings: a recipe's, where nothing else is given.

    Args:
        recipe: its name or file; None: the defaults.
        given: fields of `Settings`.

    Raises:
        UserError: for names that are no settings, and values that they cannot have.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(f"There is no setting {unknown[0]!r}; expected some of {', '.join(known)}.")
    base = Settings() if recipe is None else read_recipe(recipe).settings
    return dataclasses.replace(base, **given)
