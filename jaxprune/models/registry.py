"""Model families by the `model_type` of their `config.json`."""

from types import ModuleType
from typing import Any

from jaxprune.errors import UserError
from jaxprune.models import llava, llava_next

FAMILIES: dict[str, ModuleType] = {"llava": llava, "llava_next": llava_next}
"""Each module has the stage functions of `models/llava/modeling.py` and a config class."""

CONFIGS: dict[str, Any] = {
    "llava": llava.LlavaConfig,
    "llava_next": llava_next.LlavaNextConfig,
}


def family(config: Any) -> ModuleType:
    """The module whose functions run a model of this config."""
    return FAMILIES[family_name(config)]


def family_name(config: Any) -> str:
    """The `model_type` of a config.

    Raises:
        UserError: for a config of no known family.
    """
    for name, cls in CONFIGS.items():
        if type(config) is cls:
            return name
    known = ", ".join(cls.__name__ for cls in CONFIGS.values())
    raise UserError(f"config is a {type(config).__name__}; expected one of: {known}.")
