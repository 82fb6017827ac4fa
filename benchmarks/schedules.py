"""Does a schedule save the time that its FLOPs promise? Prefill and decode, decoder alone.

    python benchmarks/schedules.py --json schedules.json

A decoder of 12 layers, width 1024, MLP 2816, with random weights, on one row of 60 text
tokens and 576 (then 2,928) visual ones. All methods take turns in every round, so that a noisy
machine treats them alike; ratios are of medians.

    promised   FLOPs of the executed, rounded-up lengths, and of the exact counts beside it
    measured   time of the unpruned prefill over that of the schedule
    memory     what XLA allocates for the prefill beside the weights, caches included
    decode     time of a step, unpruned over pruned; promised by the bytes of weights and cache
"""

import argparse
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxprune.engine.cost import cache_bytes, executed, prompt_cost
from jaxprune.engine.schedules import candidates_left, gather_schedule
from jaxprune.engine.shapes import RowRoom
from jaxprune.inputs.layout import ImageRoom, Layout, lay_out
from jaxprune.inputs.request import Row
from jaxprune.methods import (
    VTW,
    DecoderMethod,
    Depth,
    FastV,
    FitPrune,
    GSearch,
    Plan,
    PruMergePlus,
    PSigmoid,
    PyramidDrop,
)
from jaxprune.models.llama import LlamaConfig, LlamaDecoder, text_tokens
from jaxprune.models.llava import LlavaConfig
from jaxprune.ops.cuts import NO_CUTS, Tokens

console = Console(stderr=True)
TEXT = 60
NEW = 16
L = 12


def squeezed(curve: list[float]) -> tuple[float, ...]:
    """A published curve of 32 layers at the depth of 12."""
    return tuple(float(curve[round(l * 31 / (L - 1))]) for l in range(L))


def methods() -> dict[str, Any]:
    """Schedules like the published ones, at this depth."""
    depth = Depth(32, frozenset({"llava-1.5-7b"}))
    published = {}
    for save in (0.4, 0.6, 0.8):
        kept = 576 - FitPrune(save=save).removed(576, depth)
        at = [int(kept[round((l + 1) * 32 / L) - 1]) for l in range(L)]
        deletions = tuple(int(a - b) for a, b in zip([576, *at], at, strict=False))
        published[f"fitprune {save:g}"] = FitPrune(deletions=deletions, num_tokens=576)
    return {
        "none": None,
        "prumerge_plus, 25 %": PruMergePlus(keep=144),  # of 576: fewer tokens enter
        **published,
        "gsearch": GSearch(keep_rates=squeezed(list(GSearch().rates(depth)))),
        "psigmoid 0.3": PSigmoid(keep_rate=0.3, k=0.8),
        "fastv 0.5": FastV(),
        "fastv 0.25": FastV(keep_rate=0.25),
        "pyramiddrop": PyramidDrop(),
        "vtw": VTW(),
    }


def prompt(decoder: LlamaDecoder, params: Any, visual: int) -> tuple[Layout, Tokens]:
    """An image in the middle of the text; random tokens stand for all of it."""
    S, count = visual + TEXT, np.array([visual])
    room = ImageRoom(count, count, np.zeros(1, int), visual)
    layout = lay_out([Row([[0] * (TEXT // 2)] * 2, [0])], room, batch=1, sequence=S)
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab_size, size=(1, S))
    x = decoder.apply({"params": params}, jnp.asarray(ids), method="embed")
    return layout, text_tokens(x)._replace(kind=jnp.asarray(layout.embedded.kind))


def median(times: list[float]) -> float:
    return float(np.median(times))


def measure(
    visual: int, rounds: int, width: int, mlp: int, distinct: int | None, only: list[str]
) -> list[dict]:
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=L,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=8192,
    )
    config = LlavaConfig(text_config=text)
    decoder = LlamaDecoder(text)
    init = jax.jit(lambda key: decoder.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    params = init(jax.random.key(0))
    depth, room = Depth(L), RowRoom(TEXT, visual)

    @functools.partial(jax.jit, static_argnames="schedule")
    def prefill(params: Any, tokens: Tokens, counts: Any, *, schedule: Any) -> Any:
        options = {"new_slots": NEW, "schedule": schedule, "counts": counts}
        found = decoder.apply({"params": params}, tokens, method="prefill", **options)
        return found.tokens.x[:, -1], found.caches

    @functools.partial(jax.jit, donate_argnames="caches")
    def decode(params: Any, position: Any, caches: Any, step: Any) -> Any:
        seen = jnp.arange(NEW)[None] < step
        fields = (jnp.zeros(1, jnp.int32), position, caches, step, seen)
        return decoder.apply({"params": params}, *fields, method="decode")

    position = jnp.array([visual + TEXT])
    steps = np.arange(6, dtype=np.int32)
    runs = {}
    chosen = {n: m for n, m in methods().items() if n == "none" or not only or n in only}
    for name, method in track(chosen.items(), f"Compiling, {visual}", console=console):
        schedule, counts, entering = NO_CUTS, None, visual
        if isinstance(method, PruMergePlus):
            entering = visual * 144 // 576 + 1  # the merged token
        layout, tokens = prompt(decoder, params, entering)
        if isinstance(method, DecoderMethod):
            schedule = gather_schedule(method, depth, room, distinct=distinct)
            counts = candidates_left(method, depth, layout)
        compiled = prefill.lower(params, tokens, counts, schedule=schedule).compile()
        run = functools.partial(compiled, params, tokens, counts)
        sizes = compiled.memory_analysis()
        caches = jax.block_until_ready(run())[1]
        caches = jax.block_until_ready(decode(params, position, caches, steps[0]))[1]
        runs[name] = {"method": method, "schedule": schedule, "run": run, "caches": caches}
        runs[name] |= {"prefill": [], "decode": [], "entering": entering}
        runs[name]["memory"] = sizes.temp_size_in_bytes + sizes.output_size_in_bytes

    for _round in track(range(rounds), f"Measuring, {visual}", console=console):
        for one in runs.values():
            began = time.perf_counter()
            jax.block_until_ready(one["run"]())
            one["prefill"].append(time.perf_counter() - began)
            for step in steps[1:]:
                began = time.perf_counter()
                logits, one["caches"] = decode(params, position, one["caches"], step)
                jax.block_until_ready(logits)
                one["decode"].append(time.perf_counter() - began)

    weights = (
        sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed_tokens"]["embedding"].nbytes
    )
    base = runs["none"]
    rows = []
    for name, one in runs.items():
        entering = one["entering"]
        found = executed(config, entering + TEXT, one["schedule"], new_slots=NEW)
        whole = executed(config, visual + TEXT, NO_CUTS, new_slots=NEW)
        inside = isinstance(one["method"], DecoderMethod)
        exact = prompt_cost(
            config,
            Plan(decoder=one["method"] if inside else None),
            text_tokens=TEXT,
            unpruned_visual_tokens=entering,
        )
        unpruned = prompt_cost(config, Plan(), text_tokens=TEXT, unpruned_visual_tokens=visual)
        full = L * cache_bytes(text, visual + TEXT + NEW)
        rows.append(
            {
                "method": name,
                "visual_tokens": visual,
                "prefill_seconds": median(one["prefill"]),
                "prefill_speedup": median(base["prefill"]) / median(one["prefill"]),
                "promised_by_executed_flops": whole["macs"] / found["macs"],
                "promised_by_exact_flops": unpruned.macs / exact.macs,
                "prefill_bytes": one["memory"],
                "decode_seconds": median(one["decode"]),
                "decode_speedup": median(base["decode"]) / median(one["decode"]),
                "promised_by_bytes": (weights + full) / (weights + found["cache_bytes"]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--visual-tokens", type=int, nargs="*", default=[576, 2928])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--exact", action="store_true", help="as many lengths as there are")
    parser.add_argument("--only", nargs="*", default=[], help="these methods, by their labels")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    args = parser.parse_args()
    rows = []
    for visual in args.visual_tokens:
        rounds = max(3, args.rounds * 576 // visual)
        distinct = None if args.exact else 8
        rows += measure(visual, rounds, args.width, args.mlp, distinct, args.only)
    print(
        "| visual tokens | method | prefill, ms | speed-up | promised, executed | of it | "
        "promised, exact | memory, MB | decode, ms | speed-up | promised, bytes |"
    )
    print("|---:|---|" + "---:|" * 9)
    for r in rows:
        share = r["prefill_speedup"] / r["promised_by_executed_flops"]
        print(
            f"| {r['visual_tokens']} | {r['method']} | {1e3 * r['prefill_seconds']:.0f} | "
            f"{r['prefill_speedup']:.2f} | {r['promised_by_executed_flops']:.2f} | {share:.2f} | "
            f"{r['promised_by_exact_flops']:.2f} | {r['prefill_bytes'] / 1e6:.0f} | "
            f"{1e3 * r['decode_seconds']:.1f} | "
            f"{r['decode_speedup']:.2f} | {r['promised_by_bytes']:.2f} |"
        )
    if args.json:
        device = jax.devices()[0]
        versions = {"jax": jax.__version__, "device": f"{device.platform}, {device.device_kind}"}
        args.json.write_text(json.dumps({"rows": rows, **versions}, indent=1))


if __name__ == "__main__":
    main()
