"""What choosing costs: every vision-side method on features of a published size.

    python benchmarks/selection.py                      # LLaVA-1.5-7B, eight images, some minutes
    python benchmarks/selection.py --batch 1 --rounds 3

Times of choosing and merging are measured. The prefill that they are compared with is one decoder
layer of the model's widths over the unpruned rows, measured in turn, times the number of layers:
the whole model may not fit into memory, and its tower is left out, so that shares come out high.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from jaxprune.engine import stages
from jaxprune.methods.base import VisionMethod
from jaxprune.methods.resolve import METHODS
from jaxprune.models.llama.modeling import LlamaLayer, text_tokens
from jaxprune.ops import rope
from jaxprune.ops.tiles import Questions, one_tile, pack_tilings
from jaxprune.ops.visual import PROJECTED, Signal, VisionOutput

TEXT = 64


def methods(keep: int) -> dict[str, VisionMethod]:
    """Every vision-side method that ships and is for images, with so many patches kept."""
    made = {}
    for name, cls in METHODS.items():
        if not (isinstance(cls, type) and issubclass(cls, VisionMethod)):
            continue
        if not getattr(cls, "of_videos", False):
            made[name] = cls(keep=keep)
    return made


def signal_of(signal: Signal, tiles: int, config: Any, key: jax.Array) -> jax.Array:
    """Random numbers of a signal's shape."""
    N, C = config.tower.tokens_per_tile, config.vision_config.hidden_size
    widths = {
        "keys": C if signal.heads == "joined" else C // config.vision_config.num_attention_heads,
        "hidden_states": C,
        "features": C,
        "projected": config.text_config.hidden_size,
    }
    if signal.kind in widths:
        return jax.random.normal(key, (tiles, N, widths[signal.kind]))
    return jax.nn.softmax(2 * jax.random.normal(key, (tiles, N)))


def seconds(function: Any, rounds: int) -> float:
    """Median, after a round that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llava-1.5-7b", help="a preset")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--keep", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the numbers here too")
    options = parser.parse_args()

    config: Any = jaxprune.read_config(options.model, "float32")
    text, B, N = config.text_config, options.batch, config.tower.tokens_per_tile
    layer, key = LlamaLayer(text), jax.random.key(0)
    tokens = text_tokens(jax.random.normal(key, (B, N + TEXT, text.hidden_size)))
    angles = rope.angles(tokens.positions, jnp.asarray(rope.frequencies(text.head_dim, 1e4)))

    def through(module: LlamaLayer, tokens: Any, angles: Any) -> Any:
        heads, _, _ = module.attend(tokens, angles)
        return module.feed_forward(tokens.x, heads)

    weights = layer.init(key, tokens, angles, method=through)
    one_layer = jax.jit(lambda w, t, a: layer.apply(w, t, a, method=through))
    one = seconds(functools.partial(one_layer, weights, tokens, angles), 3)
    prefill = text.num_hidden_layers * one

    packing = pack_tilings([one_tile(N)] * B, images=B, tiles=B, image_tiles=1, slots=N)
    questions = Questions(
        jax.random.normal(key, (B, TEXT, text.hidden_size)), jnp.ones((B, TEXT), bool)
    )
    rows = []
    chosen = [(name, k, m) for k in options.keep for name, m in methods(k).items()]
    for name, keep, method in track(chosen, "Choosing", console=Console(stderr=True)):
        found = {s: signal_of(s, B, config, key) for s in {*method.signals, PROJECTED}}
        features = jax.random.normal(key, (B, N, config.vision_config.hidden_size))
        vision = VisionOutput(features, features[:, 0], {s: found[s] for s in method.signals})
        capacity = method.fixed_count(N) + method.extra_tokens.number

        def select(method: Any = method, vision: Any = vision, room: int = capacity) -> Any:
            asked = questions if method.reads_question else None
            return stages.select(vision, packing, asked, method, capacity=room, images=B)

        own = seconds(select, options.rounds)
        rows.append({"method": name, "keep": keep, "seconds": own, "share": own / prefill})

    table = Table("method", "keep", "ms", "% of the unpruned prefill")
    for row in rows:
        share = f"{100 * row['share']:.3f}"
        table.add_row(row["method"], str(row["keep"]), f"{1e3 * row['seconds']:.1f}", share)
    Console().print(table)
    print(
        f"Prefill of {B} rows of {N + TEXT} slots: {prefill:.1f} s; {jax.devices()[0].device_kind}."
    )
    if options.json:
        fields = {"prefill": prefill, "rows": rows, "batch": B}
        pathlib.Path(options.json).write_text(json.dumps(fields))


if __name__ == "__main__":
    main()
