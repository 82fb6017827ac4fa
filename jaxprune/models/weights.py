"""The vocabulary of a family's `weights.py`: which stored tensor is which parameter.

A `KeyTable` is plain data, read in both directions. Those of a model's parts are written with
names relative to the part, put in their places with `under`, and added up:

    LLAVA = PROJECTOR + CLIP.under("vision_tower.", "vision_tower/") + ...
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """One parameter's layout: PyTorch's -> ours, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    export: Callable[[np.ndarray], np.ndarray]

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape in PyTorch of a parameter of `shape`, without memory for either."""
        return self.export(np.broadcast_to(np.zeros((), np.int8), shape)).shape


def _load_patches(x: np.ndarray) -> np.ndarray:
    """Convolution `[C, 3, p, p]` -> matrix `[p * p * 3, C]`."""
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _export_patches(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(side, side, 3, x.shape[1]).transpose(3, 2, 0, 1)


KEEP = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(np.transpose, np.transpose)
PATCHES = Transform(_load_patches, _export_patches)


def split_rows(x: np.ndarray, rows: Sequence[int], blocks: int) -> list[np.ndarray]:
    """The parts of a fused tensor; views of it where there is one block.

    The tensor is `blocks` equal blocks of rows, and each block holds an equal share of every
    part, in order. One block: the parts are stacked, `q | k | v`. As many as key/value heads:
    InternLM2's `wqkv`, `q q k v | q q k v | ...` with a head a letter.

    Args:
        x: `[sum(rows), ...]`.
        rows: each part's number of rows, multiples of `blocks`.
        blocks: the number of blocks.

    Returns:
        `[rows[i], ...]` of every part.
    """
    _check_blocks(rows, blocks)
    ends = np.cumsum([count // blocks for count in rows])
    parts = np.split(x.reshape(blocks, ends[-1], *x.shape[1:]), ends[:-1], axis=1)
    return [part.reshape(-1, *x.shape[1:]) for part in parts]


def join_rows(parts: Sequence[np.ndarray], blocks: int) -> np.ndarray:
    """The fused tensor of parts `[rows[i], ...]`: the inverse of `split_rows`."""
    _check_blocks([len(part) for part in parts], blocks)
    blocked = [part.reshape(blocks, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(blocked, axis=1).reshape(-1, *parts[0].shape[1:])


def _check_blocks(rows: Sequence[int], blocks: int) -> None:
    if any(count % blocks for count in rows):
        raise AssertionError(f"{blocks} blocks do not divide parts of {list(rows)} rows")


def _one_block(config: object) -> int:
    del config
    return 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """A stored tensor and the parameter, or the several parameters, that it holds.

    A letter in braces stands for the same number in the key and in every path, `{l}` for that
    of a layer.

    Attributes:
        key: its key in the spelling that the table keeps.
        path: the parameter's path in the tree, or the paths of several, in the order of
            their rows in the stored tensor.
        transform: from each part's rows to the parameter.
        blocks: in how many blocks the rows of several parameters alternate, given the
            model's config; see `split_rows`.
        optional: whether models of some configs lack the parameter and pass over the tensor.
    """

    key: str
    path: str | tuple[str, ...]
    transform: Transform
    blocks: Callable[[Any], int] = _one_block
    optional: bool = False

    def __post_init__(self) -> None:
        if any(_fields(path) != _fields(self.key) for path in self.paths):
            raise AssertionError(f"{self.key} and {self.path} differ in their fields")

    @property
    def paths(self) -> tuple[str, ...]:
        return self.path if isinstance(self.path, tuple) else (self.path,)

    def renamed(self, key: Callable[[str], str], path: Callable[[str], str]) -> "Rule":
        """The rule with its key and paths passed through functions."""
        return dataclasses.replace(self, key=key(self.key), path=tuple(map(path, self.paths)))

    def stored_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The stored tensor's shape.

        Args:
            shapes: the parameters', in the order of `paths`.
        """
        first, *others = map(self.transform.stored_shape, shapes)
        return (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first

    def load(self, stored: np.ndarray, shapes: Sequence[Shape], config: object) -> list[np.ndarray]:
        """The parameters of a stored tensor, in the order of `paths`.

        Args:
            stored: the tensor in PyTorch's layout.
            shapes: the parameters' shapes, in the order of `paths`.
            config: the model's config.
        """
        if len(shapes) == 1:
            return [self.transform.load(stored)]
        rows = [self.transform.stored_shape(shape)[0] for shape in shapes]
        return [self.transform.load(x) for x in split_rows(stored, rows, self.blocks(config))]

    def export(self, parameters: Sequence[np.ndarray], config: object) -> np.ndarray:
        """The stored tensor of parameters in the order of `paths`."""
        parts = [self.transform.export(parameter) for parameter in parameters]
        return join_rows(parts, self.blocks(config)) if len(parts) > 1 else parts[0]


def linear(
    key: str, path: str | tuple[str, ...], blocks: Callable[[Any], int] = _one_block
) -> tuple[Rule, Rule]:
    """The rules of a `Linear`, `key.weight` and `key.bias`, or of several stored as one.

    A config may leave the bias out: a rule says where a parameter is, not that there is one.
    """
    paths = path if isinstance(path, tuple) else (path,)
    kernels = tuple(f"{path}/kernel" for path in paths)
    biases = tuple(f"{path}/bias" for path in paths)
    return (
        Rule(f"{key}.weight", kernels, TRANSPOSE, blocks),
        Rule(f"{key}.bias", biases, KEEP, blocks),
    )


def layer_norm(key: str, path: str) -> tuple[Rule, Rule]:
    """The rules of a `LayerNorm`."""
    return Rule(f"{key}.weight", f"{path}/scale", KEEP), Rule(f"{key}.bias", f"{path}/bias", KEEP)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A published spelling of keys, rewritten to the one that the table keeps.

    Attributes:
        pattern: a regular expression for the start of a key, after `prefix`.
        replacement: what stands there instead, as in `re.sub`.
        prefix: only keys that start with it are rewritten.
    """

    pattern: str
    replacement: str
    prefix: str = ""

    def rewrite(self, key: str) -> str:
        if not key.startswith(self.prefix):
            return key
        rest = key.removeprefix(self.prefix)
        return self.prefix + re.sub(rf"\A(?:{self.pattern})", self.replacement, rest)


@dataclasses.dataclass(frozen=True)
class KeyTable:
    """How the weights of a family, or of a part of one, are stored, named and split.

    Attributes:
        rules: every parameter's rule; exactly one fits each key and each path.
        also_read: rules for other forms in which published checkpoints store the same
            parameters; they are read and never written.
        spellings: the rewrites to the rules' spelling of keys, all applied in order.
        ignored: regular expressions for keys, in the rules' spelling, that hold no weights
            of the model.
        partition: (regular expression for a path, axis of the parameter that a mesh
            splits); what none fits is on every device whole.
        words: the paths of the embedding and of the head, which may be tied to it.
    """

    rules: tuple[Rule, ...] = ()
    also_read: tuple[Rule, ...] = ()
    spellings: tuple[Spelling, ...] = ()
    ignored: tuple[str, ...] = ()
    partition: tuple[tuple[str, int], ...] = ()
    words: tuple[str, ...] = ()

    def __add__(self, other: "KeyTable") -> "KeyTable":
        return KeyTable(
            rules=self.rules + other.rules,
            also_read=self.also_read + other.also_read,
            spellings=self.spellings + other.spellings,
            ignored=self.ignored + other.ignored,
            partition=self.partition + other.partition,
            words=self.words + other.words,
        )

    def under(self, key: str, path: str) -> "KeyTable":
        """The table of a part inside a model.

        Args:
            key: what its keys start with there, "vision_tower.".
            path: what its parameters' paths start with there, "vision_tower/".
        """

        def moved(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
            return tuple(rule.renamed(lambda x: key + x, lambda x: path + x) for rule in rules)

        return KeyTable(
            rules=moved(self.rules),
            also_read=moved(self.also_read),
            spellings=tuple(
                dataclasses.replace(spelling, prefix=key + spelling.prefix)
                for spelling in self.spellings
            ),
            ignored=tuple(f"{re.escape(key)}(?:{pattern})" for pattern in self.ignored),
            partition=tuple(
                (f"{re.escape(path)}(?:{pattern})", axis) for pattern, axis in self.partition
            ),
            words=tuple(path + word for word in self.words),
        )

    def canonical_key(self, key: str) -> str | None:
        """A key in the rules' spelling; None for one that holds no weights."""
        key = _WRAPPERS.sub("", key)
        for spelling in self.spellings:
            key = spelling.rewrite(key)
        return None if any(re.fullmatch(pattern, key) for pattern in self.ignored) else key

    def rule_of_key(self, key: str) -> Rule | None:
        """The rule of a key in the rules' spelling, its fields filled in; None if none fits."""
        return _only_match(key, self._by_key)

    def rule_of_path(self, path: str) -> Rule:
        """The rule by which a parameter is written, its fields filled in."""
        rule = _only_match(path, self._by_path)
        if rule is None:
            raise AssertionError(f"no rule of the key table fits the parameter {path}")
        return rule

    @functools.cached_property
    def _by_key(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_compiled(rule.key), rule) for rule in self.rules + self.also_read]

    @functools.cached_property
    def _by_path(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_compiled(path), rule) for rule in self.rules for path in rule.paths]


# What training loops put around a model: data parallelism in front, torch.compile anywhere.
_WRAPPERS = re.compile(r"\Amodule\.|(?<![^.])_orig_mod\.")


def _fields(template: str) -> set[str]:
    return set(re.findall(r"\{(\w)\}", template))


def _compiled(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _only_match(name: str, patterns: list[tuple[re.Pattern[str], Rule]]) -> Rule | None:
    """The rule whose pattern fits a name, with the fields that were found there.

    Raises:
        AssertionError: when several fit.
    """
    hits = [(found, rule) for pattern, rule in patterns if (found := pattern.fullmatch(name))]
    if len(hits) > 1:
        raise AssertionError(f"{name} matches {len(hits)} rules of the key table")
    if not hits:
        return None
    found, rule = hits[0]
    fields: Mapping[str, str] = found.groupdict()
    return rule.renamed(lambda key: key.format(**fields), lambda path: path.format(**fields))
