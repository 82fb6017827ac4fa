"""What the import hook of conftest.py checks annotations with."""

from beartype import beartype


def functions(function):
    """Types and shapes of calls; a dataclass checks what its users give it by its own code."""
    return function if function.__name__ == "__init__" else beartype(function)
