"""Procedurally drawn scenes with questions and answers: coloured shapes on textured ground.

The small model that ships was trained on them, and they serve wherever data is needed
without a download: accuracy tables, calibration, tests. Everything follows from a seed.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (246, 210, 40),
    "purple": (136, 50, 170),
    "orange": (245, 130, 30),
    "cyan": (60, 205, 215),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = {"small": 7.5, "medium": 10.0, "large": 14.0}  # radius in pixels of a 96-pixel scene
POSITIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
KINDS = ("color", "shape", "count", "position", "comparison", "yes/no")
SPLITS = ("train", "held-out", "calibration")
SCENE_SIZE = 96
MAX_OBJECTS = 5


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape; `x` and `y` are its centre in pixels of a 96-pixel scene."""

    color: str
    shape: str
    size: str
    position: str
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    texture_seed: int


@dataclasses.dataclass(frozen=True)
class Question:
    kind: str
    question: str
    answer: str


def random_generator(split: str, seed: int, index: int) -> np.random.Generator:
    """The generator of scene `index`: splits never share a stream, whatever their seeds."""
    return np.random.default_rng([SPLITS.index(split), seed, index])


def sample_scene(rng: np.random.Generator) -> Scene:
    """One to five shapes in different cells of a 3 x 3 grid, no two of the same name."""
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    # Few colours and shapes a scene, so that counting by colour or shape is not always one.
    palette = rng.choice(list(COLORS), size=int(rng.integers(1, 5)), replace=False)
    forms = rng.choice(SHAPES, size=int(rng.integers(1, 5)), replace=False)
    names = [(color, form) for color in palette for form in forms]
    count = min(count, len(names))
    chosen = rng.permutation(len(names))[:count]
    cells = rng.permutation(9)[:count]
    objects = []
    for name, cell in zip(chosen, cells, strict=True):
        size = str(rng.choice(list(SIZES)))
        reach = SCENE_SIZE / 6 - SIZES[size] - 1  # stays inside its cell of 32 pixels
        dx, dy = rng.uniform(-reach, reach, size=2)
        x = (cell % 3 + 0.5) * SCENE_SIZE / 3 + dx
        y = (cell // 3 + 0.5) * SCENE_SIZE / 3 + dy
        color, form = names[name]
        objects.append(Object(str(color), str(form), size, POSITIONS[cell], float(x), float(y)))
    return Scene(tuple(objects), int(rng.integers(2**31)))


def draw(scene: Scene, size: int = SCENE_SIZE, *, shrink: float = 1.0) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels.

    Args:
        scene: what to draw.
        size: pixels along a side.
        shrink: how much smaller the shapes are, at the same places: with `size` 192 and .5
            they have the pixels that they have in a scene of 96, in a larger picture.
    """
    rng = np.random.default_rng(scene.texture_seed)
    scale = 2 * size / SCENE_SIZE  # drawn at twice the size, then reduced: smooth edges
    image = Image.fromarray(_texture(rng, size)).resize(
        (2 * size, 2 * size), Image.Resampling.BICUBIC
    )
    canvas = ImageDraw.Draw(image)
    for item in scene.objects:
        shade = np.array(COLORS[item.color]) + rng.uniform(-14, 14, size=3)
        fill = tuple(int(v) for v in np.clip(shade, 0, 255))
        outline = _outline(item.shape, SIZES[item.size] * shrink * scale)
        corners = [(item.x * scale + u, item.y * scale + v) for u, v in outline]
        canvas.polygon(corners, fill=fill)
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Muted ground: a colour, two waves and grain; uint8 `[size, size, 3]`."""
    base = rng.uniform(70, 130) + rng.uniform(-12, 12, size=3)
    y, x = np.mgrid[:size, :size] / size
    ground = np.zeros((size, size))
    for _ in range(2):
        angle, waves = rng.uniform(0, math.pi), rng.uniform(1, 9)
        phase = rng.uniform(0, 2 * math.pi)
        wave = np.sin(2 * math.pi * waves * (x * math.cos(angle) + y * math.sin(angle)) + phase)
        ground += rng.uniform(3, 12) * wave
    grain = rng.normal(0, rng.uniform(2, 8), size=(size, size, 3))
    return np.clip(base + ground[..., None] + grain, 0, 255).astype(np.uint8)


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corners around (0, 0), in pixels; all shapes of one radius look about as large."""

    def ring(corners: int, start: float, radii: tuple[float, ...]) -> list[tuple[float, float]]:
        angles = [start + 2 * math.pi * i / corners for i in range(corners)]
        reach = [radii[i % len(radii)] for i in range(corners)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]

    if shape == "circle":
        return ring(40, 0.0, (0.95 * radius,))
    if shape == "square":
        side = 0.85 * radius
        return [(-side, -side), (side, -side), (side, side), (-side, side)]
    if shape == "triangle":
        return [(0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)]
    if shape == "diamond":
        return [(0, -radius), (0.7 * radius, 0), (0, radius), (-0.7 * radius, 0)]
    if shape == "star":
        return ring(10, -math.pi / 2, (radius, 0.42 * radius))
    arm = 0.33 * radius  # cross
    return [
        (-arm, -radius), (arm, -radius), (arm, -arm), (radius, -arm), (radius, arm), (arm, arm),
        (arm, radius), (-arm, radius), (-arm, arm), (-radius, arm), (-radius, -arm), (-arm, -arm),
    ]  # fmt: skip


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of one kind with its answer, or None where the scene allows none."""
    found = _ASK[kind](scene, rng)
    return None if found is None else Question(kind, *found)


def sample(split: str, seed: int, index: int, kind: str | None = None) -> tuple[Scene, Question]:
    """Scene `index` of a split and one question; kinds take turns unless one is named."""
    rng = random_generator(split, seed, index)
    kind = KINDS[index % len(KINDS)] if kind is None else kind
    while True:
        scene = sample_scene(rng)
        question = ask(scene, kind, rng)
        if question is not None:
            return scene, question


def only(values: list[str]) -> list[str]:
    """The values that occur once, in order."""
    return [value for value in dict.fromkeys(values) if values.count(value) == 1]


def _ask_color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    shapes = only([item.shape for item in scene.objects])
    if not shapes:
        return None
    shape = str(rng.choice(shapes))
    color = next(item.color for item in scene.objects if item.shape == shape)
    return f"What color is the {shape}?", color


def _ask_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    colors = only([item.color for item in scene.objects])
    if not colors:
        return None
    color = str(rng.choice(colors))
    shape = next(item.shape for item in scene.objects if item.color == color)
    return f"What shape is the {color} object?", shape


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    groups = {"objects": len(scene.objects)}
    for color in COLORS:
        groups[f"{color} objects"] = sum(item.color == color for item in scene.objects)
    for shape in SHAPES:
        plural = "crosses" if shape == "cross" else f"{shape}s"
        groups[plural] = sum(item.shape == shape for item in scene.objects)
    # First the number, then the group: else nearly every answer would be zero.
    number = int(rng.choice(sorted(set(groups.values()))))
    group = str(rng.choice([name for name, n in groups.items() if n == number]))
    return f"How many {group} are there?", str(number)


def _ask_position(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item = scene.objects[rng.integers(len(scene.objects))]
    return f"Where is the {item.name}?", item.position


def _ask_comparison(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if len(scene.objects) < 2:
        return None
    pair = [scene.objects[i] for i in rng.permutation(len(scene.objects))[:2]]
    measures: dict[str, list[float]] = {
        "larger": [SIZES[item.size] for item in pair],
        "further left": [-(POSITIONS.index(item.position) % 3) for item in pair],
        "higher": [-(POSITIONS.index(item.position) // 3) for item in pair],
    }
    clear = [name for name, (a, b) in measures.items() if a != b]
    if not clear:
        return None
    name = str(rng.choice(clear))
    a, b = measures[name]
    answer = pair[0] if a > b else pair[1]
    return f"Which is {name}, the {pair[0].name} or the {pair[1].name}?", answer.name


def _ask_yes_no(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    names = [item.name for item in scene.objects]
    if rng.random() < 0.5:
        return _is_there(str(rng.choice(names))), "yes"
    # Half of the absent ones share a colour and a shape with what is there: no shortcut.
    colors = [item.color for item in scene.objects] if rng.random() < 0.5 else list(COLORS)
    shapes = [item.shape for item in scene.objects] if rng.random() < 0.5 else list(SHAPES)
    while True:
        name = f"{rng.choice(colors)} {rng.choice(shapes)}"
        if name not in names:
            return _is_there(name), "no"
        colors, shapes = list(COLORS), list(SHAPES)


def _is_there(name: str) -> str:
    return f"Is there {'an' if name.startswith('o') else 'a'} {name}?"


_ASK = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "position": _ask_position,
    "comparison": _ask_comparison,
    "yes/no": _ask_yes_no,
}
