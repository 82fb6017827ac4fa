"""Who may import whom: one way, from the command line down to array operations."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent / "jaxprune"
# A room may import itself and those after it.
ORDER = [
    "cli", "train", "reports", "evaluate", "generate", "calibrate", "data", "engine", "model",
    "checkpoints_convert", "inputs", "models", "methods", "devices", "ops", "files",
    "progress", "errors", "version",
]  # fmt: skip


def imports_of(path):
    """What a file imports of the package and of Flax, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("jaxprune", "flax")]


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [
    path
    for path in ROOT.rglob("*.py")
    if path.name != "__main__.py" and path != ROOT / "__init__.py"
]


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in imports_of(path)
        if name.split(".")[1:] and name.split(".")[0] == "jaxprune"
        if name.split(".")[1] in ORDER  # what is no room is a public name of the package
        if ORDER.index(name.split(".")[1]) < ORDER.index(room_of(path))
    ]
    assert wrong == []


def test_every_room_has_its_place():
    assert {room_of(path) for path in FILES} - {"assets"} == set(ORDER)


def test_flax_stays_in_the_models_and_methods_know_none():
    for path in FILES:
        names, room = imports_of(path), room_of(path)
        if room in ("ops", "methods", "inputs", "devices", "engine"):
            assert not [name for name in names if name.startswith("flax")], path
        if any(name.startswith("flax.linen") for name in names):
            assert path.name in ("modeling.py", "lora.py"), path  # or what acts around modules
        if room == "methods":
            assert not [name for name in names if name.startswith("jaxprune.models")], path


def test_only_the_engine_runs_stages():
    """And the pure function that users put into programs of their own, and what only compiles."""
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        if "jaxprune.engine.stages" in imports_of(path)
    }
    assert users == {"engine/engine.py", "engine/forward.py", "engine/programs.py"}
