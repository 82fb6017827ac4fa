"""What choosing costs on a TPU, as its compiler estimates it: every method that ships for images.

    pip install 'jaxprune[tpu-compile]'
    python benchmarks/selection_compiled.py                     # LLaVA-1.5-7B, eight rows, v5e
    python benchmarks/selection_compiled.py --method scope --method dart --batch 1

No TPU is needed and nothing runs. Compiled by itself is, of a vision-side method, the signals that
the tower gives for it (`encode` with less `encode` without, of three layers), CLIP's text tower and
`select`; of a decoder-side method each cut: its ranking, what it recycles, and shortening the
sequence. Shares are of the unpruned prefill's bound, its FLOPs at the chip's peak, so that they
come out high. Prints a Markdown table.

Of a loop that ends when enough is chosen the rounds are those of `ROUNDS`. Left out is what the
compiler does not estimate: waiting for memory, sorts, and what the prefill's attention notes down
on its way for methods that all tokens ask for (fitprune).
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

import jaxprune
from jaxprune.devices.hlo import read_program
from jaxprune.devices.targets import Target, parse_target, topology_devices
from jaxprune.engine import stages
from jaxprune.engine.cost import layer_macs
from jaxprune.engine.schedules import gather_schedule
from jaxprune.engine.shapes import ALIGNED, RowRoom
from jaxprune.methods import resolve
from jaxprune.methods.base import DecoderMethod, VisionMethod
from jaxprune.models.clip import ClipTextConfig
from jaxprune.models.clip.modeling import text_tower_shapes
from jaxprune.models.registry import depth_of, family_of
from jaxprune.ops.attention.definition import Options, received_from_few
from jaxprune.ops.cuts import LayerView, Schedule, Tokens
from jaxprune.ops.tiles import Packing, Questions, one_tile, pack_tilings
from jaxprune.ops.visual import PROJECTED, TEXT_SIMILARITY, Signal, VisionOutput

TEXT = 64
METHODS: dict[str, dict[str, Any]] = {
    "fastervlm": {"keep": 64},
    "divprune": {"keep": 64},
    "scope": {"keep": 64},
    "vispruner": {"keep": 64},
    "hiprune": {"keep": 64},
    "cdpruner": {"keep": 64},
    "visionzip": {"keep": 64},
    "mmtok": {"keep": 64},
    "holov": {"keep": 64},
    "prumerge": {"keep": 64},
    "prumerge_plus": {"keep": 64},
    "uniform": {"keep": 64},
    "random": {"keep": 64},
    "fastv": {"keep_rate": 64 / 576},
    "pyramiddrop": {},
    "psigmoid": {"keep_rate": 0.262},
    "gsearch": {},
    "fitprune": {"save": 0.8},
    "v2drop": {"budget": 64},
    "dart": {"tokens": 64},
    "feather": {},
    "sparsevlm": {"budget": 64},
    "sparsevlm plus": {"method": "sparsevlm", "budget": 64, "version": "plus"},
}
ROUNDS = {
    "vispruner": (576 - 64) // 8,  # eight are dropped a round
    "holov": 16,  # no more than crops, and mostly none
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Programs of one model's sizes on one chip.

    Attributes:
        config: of the model.
        target: the chip.
        batch: rows, of an image each.
    """

    config: Any
    target: Target
    batch: int

    def estimate(self, function: Callable[..., Any], *arguments: Any, rounds: int = 1) -> float:
        """Seconds of a program's fusions, by the compiler."""
        where = SingleDeviceSharding(topology_devices(self.target)[0])

        def placed(x: Any) -> Any:
            dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
            return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=where)

        shapes = jax.tree.map(placed, arguments)
        platforms = (self.target.chip.platform,)
        made = jax.jit(function).trace(*shapes).lower(lowering_platforms=platforms).compile()
        program = read_program(made.as_text(), least=2**30, rounds=rounds)
        return program.cycles / self.target.chip.hertz

    @property
    def prefill(self) -> float:
        """The bound of an unpruned prefill."""
        c, slots = self.config.text_config, TEXT + self.config.tower.tokens_per_tile
        macs = c.num_hidden_layers * layer_macs(c, slots, slots)
        return 2 * self.batch * macs / self.target.chip.flops

    # ---- before the decoder

    @property
    def packing(self) -> Packing:
        N = self.config.tower.tokens_per_tile
        return pack_tilings(
            [one_tile(N)] * self.batch, images=self.batch, tiles=self.batch, image_tiles=1, slots=N
        )

    def signal(self, signal: Signal) -> jax.ShapeDtypeStruct:
        """The shape of a signal."""
        c, N = self.config.vision_config, self.config.tower.tokens_per_tile
        widths = {
            "keys": c.hidden_size if signal.heads == "joined" else self.head_width,
            "features": c.hidden_size,
            "projected": self.config.text_config.hidden_size,
        }
        if signal.kind not in widths:
            return jax.ShapeDtypeStruct((self.batch, N), jnp.float32)
        dtype = jnp.float32 if signal.kind == "keys" and signal.heads == "mean" else c.dtype
        return jax.ShapeDtypeStruct((self.batch, N, widths[signal.kind]), dtype)

    @property
    def head_width(self) -> int:
        c = self.config.vision_config
        width: int = c.hidden_size // c.num_attention_heads
        return width

    @functools.lru_cache(maxsize=32)  # noqa: B019 - lives as long as the process
    def encoding(self, signals: frozenset[Signal]) -> float:
        """Of a tower of three layers, with its signals."""
        few = dataclasses.replace(self.config.vision_config, num_hidden_layers=3)
        config = dataclasses.replace(self.config, vision_config=few)
        side = config.tower.tile_size
        pixels = jax.ShapeDtypeStruct((self.batch, side, side, 3), jnp.float32)

        def encode(params: Any, pixels: Any) -> Any:
            return stages.encode(params, pixels, config=config, signals=signals)

        return self.estimate(encode, family_of(config).param_shapes(config), pixels)

    def of_vision(self, method: VisionMethod, rounds: int) -> dict[str, float]:
        """Seconds of each part of a method."""
        N, features = self.config.tower.tokens_per_tile, Signal("features")
        shape = self.signal(features)
        cls = jax.ShapeDtypeStruct((self.batch, shape.shape[-1]), shape.dtype)
        vision = VisionOutput(shape, cls, {s: self.signal(s) for s in method.signals})
        words = self.signal(PROJECTED).shape[-1]
        questions = Questions(
            jax.ShapeDtypeStruct((self.batch, TEXT, words), shape.dtype),
            jax.ShapeDtypeStruct((self.batch, TEXT), bool),
        )
        count = method.fixed_count(N)
        assert count is not None
        room = count + method.extra_tokens.number

        def select(vision: Any, packing: Any, asked: Any) -> Any:
            asked = asked if method.reads_question else None
            return stages.select(vision, packing, asked, method, capacity=room, images=self.batch)

        own = frozenset(
            dataclasses.replace(s, layer=1) if isinstance(s.layer, int) and s.layer > 1 else s
            for s in method.tower_signals  # of the few layers
        )
        parts = {"choosing": self.estimate(select, vision, self.packing, questions, rounds=rounds)}
        parts["signals"] = max(self.encoding(own) - self.encoding(frozenset()), 0.0)
        if TEXT_SIMILARITY in method.signals:
            parts["text tower"] = self.text_tower(vision)
        return parts

    def text_tower(self, vision: VisionOutput) -> float:
        """Reading a question of up to 77 tokens for each image, and comparing patches with it."""
        config = ClipTextConfig(dtype=self.config.dtype)
        texts = jax.ShapeDtypeStruct((self.batch, 1, config.max_position_embeddings), jnp.int32)
        bare = VisionOutput(vision.features, None, {})

        def compare(params: Any, vision: Any, packing: Any, texts: Any) -> Any:
            return stages.compare(params, vision, packing, texts, config=config)

        return self.estimate(compare, text_tower_shapes(config), bare, self.packing, texts)

    # ---- inside it

    def of_decoder(self, method: DecoderMethod) -> dict[str, float]:
        """Seconds of all of a method's cuts."""
        room = RowRoom(TEXT, self.config.tower.tokens_per_tile)
        schedule = gather_schedule(
            method, depth_of(self.config), room, distinct=8, multiple=ALIGNED
        )
        before = [room.slots, *(schedule.lengths or ())]
        total, known = 0.0, dict[Any, float]()
        for layer in schedule.layers:
            # Cuts of equal lengths are equal programs, unless the method tells layers apart.
            at = (before[layer], before[layer + 1], schedule.ranker.score is None and layer)
            if at not in known:
                known[at] = self.cut(schedule, layer, before[layer])
            total += known[at]
        return {"cuts": total}

    def cut(self, schedule: Schedule, layer: int, slots: int) -> float:
        """Seconds of one cut."""
        c, B, whole = self.config.text_config, self.batch, TEXT + self.config.tower.tokens_per_tile
        item = jax.ShapeDtypeStruct

        def tokens(slots: int) -> Tokens:
            each = item((B, slots), jnp.int32)
            x, cell = item((B, slots, c.hidden_size), c.dtype), item((2, B, slots), jnp.int32)
            return Tokens(x, each, item((B, slots), bool), each, each, cell)

        q = item((B, c.num_attention_heads, slots, c.head_dim), c.dtype)
        k = item((B, c.num_key_value_heads, slots, c.head_dim), c.dtype)
        angles = item((B, slots, c.head_dim // 2), jnp.float32)
        score = schedule.ranker.score
        noted = item((len(score.queries) if score else 1, B, slots), jnp.float32)
        left = item((c.num_hidden_layers, B), jnp.int32)

        def apply(tokens: Any, entered: Any, before: Any, heads: Any, noted: Any, left: Any) -> Any:
            q, k, q_plain, k_plain, angles = heads
            watch = schedule.watch(layer, tokens)
            if watch is not None and watch.rows is not None:
                of = (q, k) if watch.rotated else (q_plain, k_plain)
                options = Options(causal=True, heads=watch.heads, rows=watch.rows)
                noted = received_from_few(*of, tokens.valid, watch.queries, options)
            view = LayerView(
                tokens, before, q, k, q_plain, k_plain, noted, tokens.x, layer, _normed, angles,
                entered, schedule.query_slots,
            )  # fmt: skip
            return schedule.apply(schedule.cut, layer, tokens, (), view, left)

        x = item((B, slots, c.hidden_size), c.dtype)
        return self.estimate(
            apply, tokens(slots), tokens(whole), x, (q, k, q, k, angles), noted, left
        )


def _normed(x: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(square + 1e-5)).astype(x.dtype)


def measured(bench: Bench, names: list[str]) -> Iterator[tuple[str, dict[str, float], float]]:
    """Of each method its parts, and how long it took to compile them."""
    for name in names:
        options = {"method": name, **METHODS[name]}
        plan = resolve(options.pop("method"), depth_of(bench.config), **options)
        began = time.perf_counter()
        if plan.vision is not None:
            parts = bench.of_vision(plan.vision, ROUNDS.get(name, 1))
        else:
            assert plan.decoder is not None
            parts = bench.of_decoder(plan.decoder)
        yield name, parts, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", default="v5e")
    parser.add_argument("--model", default="llava-1.5-7b", help="a preset of LLaVA-1.5")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--method", choices=METHODS, action="append")
    asked = parser.parse_args()
    config = jaxprune.read_config(asked.model)
    bench = Bench(config, parse_target(asked.target), asked.batch)
    print(f"Prefill's bound: {1e3 * bench.prefill:.1f} ms.\n")
    print("| method | of it, ms | together, ms | of the prefill's bound | compile, s |")
    print("|---|---|---:|---:|---:|")
    for name, parts, seconds in measured(bench, asked.method or list(METHODS)):
        total = sum(parts.values())
        told = ", ".join(f"{part} {1e3 * own:.2f}" for part, own in parts.items())
        share = f"{100 * total / bench.prefill:.2f} %"
        print(f"| `{name}` | {told} | {1e3 * total:.2f} | {share} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
