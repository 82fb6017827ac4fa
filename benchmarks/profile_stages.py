"""Where the time to the first token goes, stage by stage, beside what the machine could do.

    python benchmarks/profile_stages.py                 # the benchmark's model, random weights
    python benchmarks/profile_stages.py --batch 8 --trace /tmp/trace   # and a trace for XProf

The model is that of `against_pytorch.py`. *Ideal* is the stage's multiply-adds at the rate of a
large matrix product on the same machine.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxprune.engine import stages
from jaxprune.engine.cost import executed
from jaxprune.inputs.layout import ImageRoom, lay_out
from jaxprune.inputs.request import Row
from jaxprune.models.clip import ClipVisionConfig
from jaxprune.models.llama import LlamaConfig
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import family_of
from jaxprune.ops.attention import Watch, causal_attention, full_attention
from jaxprune.ops.cuts import NO_CUTS
from jaxprune.ops.tiles import one_tile, pack_tilings
from jaxprune.reports.bench import ceilings, describe_machine

N, TEXT, NEW = 576, 60, 16


def benchmark_config() -> LlavaConfig:
    vision = ClipVisionConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trace", help="write a trace of one round to this folder")
    args = parser.parse_args()
    config, B, rng = benchmark_config(), args.batch, np.random.default_rng(0)
    params = jax.jit(lambda key: family_of(config).init_params(config, key))(jax.random.key(0))
    rate = ceilings()["float32_macs"]

    def median(run: Callable[[], Any]) -> tuple[Any, float]:
        found = jax.block_until_ready(run())
        times = []
        for _ in range(args.rounds):
            began = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - began)
        return found, float(np.median(times))

    def show(name: str, seconds: float, macs: float) -> None:
        ideal = macs / rate
        share = f"{100 * ideal / seconds:.0f} %" if macs else ""
        print(f"| {name} | {1e3 * seconds:.1f} | {1e3 * ideal:.1f} | {share} |")

    packing = pack_tilings([one_tile(N)] * B, images=B, tiles=B, image_tiles=1, slots=N)
    pixels = rng.normal(size=(B, 336, 336, 3)).astype(np.float32)
    rows = [Row([[7] * (TEXT // 2)] * 2, [i]) for i in range(B)]
    room = ImageRoom(np.full(B, N), np.full(B, N), np.zeros(B, int), N)
    layout = lay_out(rows, room, batch=B, sequence=N + TEXT)

    def encode() -> Any:
        return stages.encode(params, pixels, config=config, signals=frozenset())

    def select() -> Any:
        return stages.select(vision, packing, None, None, capacity=N, images=B)

    def embed() -> Any:
        return stages.embed(params, layout.embedded, selection, config=config)

    def prefill() -> Any:
        return stages.prefill(
            params, tokens, None, layout.next_position, np.int32(B), None,
            np.array([-1], np.int32), config=config, schedule=NO_CUTS, new_slots=NEW,
        )  # fmt: skip

    print("| stage | ms | ideal, ms | of the ceiling |")
    print("|---|---:|---:|---:|")
    c = config.text_config
    vision, seconds = median(encode)
    show("encode", seconds, config.tower.macs(B))
    selection, seconds = median(select)
    show("select (nothing pruned)", seconds, 0)
    tokens, seconds = median(embed)
    width = config.vision_config.hidden_size
    show("project and embed", seconds, B * N * c.hidden_size * (width + c.hidden_size))
    _, seconds = median(prefill)
    whole = executed(config, N + TEXT, NO_CUTS, new_slots=NEW)["macs"]
    show("prefill", seconds, B * whole)

    q, k, v = rng.normal(size=(3, B, 16, N + TEXT, 64)).astype(np.float32)
    valid = jnp.ones((B, N + TEXT), bool)
    watch = Watch(jnp.ones((2, B, N + TEXT)), "max")
    causal = jax.jit(lambda q, k, v: causal_attention(q, k, v, valid)[0])
    watched = jax.jit(lambda q, k, v: causal_attention(q, k, v, valid, watch))
    S = N + TEXT
    show("one layer's attention", median(lambda: causal(q, k, v))[1], B * S**2 * c.hidden_size)
    show("the same, watched", median(lambda: watched(q, k, v))[1], B * S**2 * c.hidden_size)
    q, k, v = rng.normal(size=(3, B, 8, N + 1, 64)).astype(np.float32)
    full = jax.jit(full_attention)
    macs = 2 * B * (N + 1) ** 2 * width
    show("one tower layer's attention", median(lambda: full(q, k, v))[1], macs)
    Console(stderr=True).print(describe_machine())
    if args.trace:
        with jax.profiler.trace(args.trace):
            for run in (encode, embed, prefill):
                jax.block_until_ready(run())


if __name__ == "__main__":
    main()
