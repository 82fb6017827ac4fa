"""Published sizes with random weights on a GPU or TPU, beside what the device could do.

    python benchmarks/accelerator.py --json accelerator.json                # LLaVA-1.5-7B, bfloat16
    python benchmarks/accelerator.py --preset llava-1.6-vicuna-7b --batch 1 4
    python benchmarks/accelerator.py --preset tiny --any-device             # does the script run

Whole requests of 336-pixel images (672 for LLaVA-NeXT) through `jaxprune.bench`, every method that
has a published recipe for the model in turn; shares of two ceilings, measured in the same run: a
large matrix product, and reading a large array. Aims: prefill at 60 % of the first, decoding at
80 % of the second. Then FitPrune is fitted on 64 samples, which should take no more than 60 s.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image
from random_model import random_params
from rich.console import Console

import jaxprune
from jaxprune.data.samples import scene_samples
from jaxprune.methods import Depth
from jaxprune.methods.recipes import published
from jaxprune.models.clip import ClipVisionConfig
from jaxprune.models.llama import LlamaConfig
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import PRESETS, depth_of
from jaxprune.reports.bench import bench, describe_machine

console = Console(stderr=True)
METHODS: dict[str, Callable[[Depth], Any]] = {
    "none": lambda _: "none",
    "prumerge": lambda _: "prumerge",
    "prumerge_plus": lambda _: "prumerge_plus",
    "fitprune": lambda depth: published("fitprune", depth, 0.6),
    "prumerge_plus + fitprune": lambda depth: ("prumerge_plus", published("fitprune", depth, 0.6)),
    "gsearch": lambda depth: published("gsearch", depth),
}


def tiny(dtype: str) -> LlavaConfig:
    """32 thin layers, which is what the published schedules are for."""
    vision = ClipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        dtype=dtype,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=32,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, dtype=dtype,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llava-1.5-7b", choices=["tiny", *PRESETS])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--samples", type=int, default=64, help="of FitPrune's fit; 0 leaves it out"
    )
    parser.add_argument("--any-device", action="store_true", help="run without an accelerator too")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    args = parser.parse_args()
    if jax.default_backend() == "cpu" and not args.any_device:
        console.print("JAX finds no GPU or TPU here, so there is nothing to measure; see --help.")
        sys.exit(2)
    make = tiny if args.preset == "tiny" else PRESETS[args.preset]
    params = random_params(make(dtype=args.dtype))
    rng, side = np.random.default_rng(0), 336 if params.config.one_tile else 672
    # The tiny model, which has no recipes, takes those of the one that it stands for.
    stand_in = Depth(32, frozenset({"llava-1.5-7b"}))
    depth = stand_in if args.preset == "tiny" else depth_of(params.config)
    methods = []
    for name, make_method in METHODS.items():
        try:
            methods.append((name, {"method": make_method(depth), "fractions": True}))
        except jaxprune.UserError as error:
            console.print(f"{name} is left out: {error}")
    found, limits = [], {}
    names = ["batch", "method", "visual", "encode, ms", "select, ms", "prefill, ms", "speed-up"]
    names += ["of the ceiling", "decode, ms a token", "speed-up", "of the ceiling", "answer, ms"]
    names += ["speed-up", "compile, s"]
    print(f"| {' | '.join(names)} |\n|---:|---|" + "---:|" * 12)
    for batch in args.batch:
        pixels = rng.integers(0, 256, size=(batch, side, side, 3), dtype=np.uint8)
        rows, limits = bench(
            params,
            [Image.fromarray(image) for image in pixels],
            " ".join(["What is in the picture?"] * 8),
            methods,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            buckets=jaxprune.Buckets(text=(64, 128, 256), new_tokens=(args.new_tokens,)),
        )
        for row in rows:
            ms = {name: f"{1e3 * value:.1f}" for name, value in row.seconds.items()}
            faster = {name: f"{ratio:.2f}" for name, ratio in row.speedup.items()}
            shares = [f"{100 * x:.0f} %" for x in (row.prefill_of_ceiling, row.decode_of_ceiling)]
            cells = [str(batch), row.method, f"{row.visual_tokens:.0f}"]
            cells += [ms["encode"], ms["select"], ms["prefill"], faster["first"], shares[0]]
            cells += [ms["decode"], faster["decode"], shares[1], ms["all"], faster["all"]]
            print(f"| {' | '.join(cells)} | {row.compile_seconds:.1f} |", flush=True)
            found.append({"batch": batch, **dataclasses.asdict(row)})
    fit = None
    if args.samples:
        began = time.perf_counter()
        samples = scene_samples(args.samples)
        jaxprune.calibrate(params, samples, method="fitprune", save=0.6)
        fit = time.perf_counter() - began
        print(f"\nFitPrune fitted on {args.samples} samples in {fit:.1f} s, compilation included.")
    machine = {**describe_machine(), "model": args.preset, "dtype": args.dtype}
    print(f"\n{machine}\nceilings: {limits}")
    if args.json:
        args.json.write_text(
            json.dumps({"rows": found, "ceilings": limits, "fit_seconds": fit, "machine": machine})
        )


if __name__ == "__main__":
    main()
