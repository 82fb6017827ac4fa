"""Buckets: 2,000 random requests without a compilation, and what other lists would cost.

    python benchmarks/buckets.py --json buckets.json          # about half an hour
    python benchmarks/buckets.py --requests 100 --sets default
    python benchmarks/buckets.py --lists-only                 # only what lists cost and save

First every kind of schedule is warmed up on the shipped model, then requests of 1 to 8 prompts of
1 to 500 text tokens, with images of random sizes, own or shared, go through all of them under
`no_compilation`. Then, for the same requests unpruned: programs and seconds of a warm-up with
several lists of buckets, and the multiply-adds that padding adds.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

import jaxprune
from jaxprune.engine.cost import layer_macs, most_tokens
from jaxprune.engine.shapes import Shapes
from jaxprune.inputs.layout import text_length
from jaxprune.inputs.request import make_request
from jaxprune.reports.bench import describe_machine

console = Console(stderr=True)
NEW = 8
METHODS: dict[str, Any] = {
    "none": {},
    "prumerge": {},
    "prumerge_plus": {},
    "prumerge, keep 16": {"method": "prumerge", "keep": 16},
    "uniform": {"keep": 36},
    "random": {"keep": 36},
    "iti": {},
    "fitprune": {"deletions": (10, 20, 20, 20, 10, 10, 5, 0), "num_tokens": 144},
    "gsearch": {"keep_rates": (1.0, 0.9, 0.6, 0.4, 0.3, 0.2, 0.1, 0.1)},
    "psigmoid": {"keep_rate": 0.5, "k": 0.5},
    "fastv": {},
    "pyramiddrop": {},
    "vtw": {},
    "prumerge_plus + fastv": {"method": ("prumerge_plus", "fastv"), "keep": 36},
}
LISTS = {
    "one of each": {"batch": (8,), "images": (1, 8), "text": (512,)},
    "coarse": {"batch": (1, 8), "images": (1, 8), "text": (64, 512)},
    "default": {},
    "fine": {"batch": (1, 2, 3, 4, 6, 8), "text": tuple(range(32, 513, 32))},
}


def buckets_of(name: str) -> jaxprune.Buckets:
    base = jaxprune.Buckets(new_tokens=(NEW,), **LISTS[name])
    return base.up_to(batch=8, images=8, row_images=1, text=512)


def random_requests(number: int) -> list[tuple[list, list[str]]]:
    """Images and prompts; token ids differ from words, so lengths are spread by hand."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(number):
        rows = int(rng.integers(1, 9))
        images = []
        for _row in range(rows):
            width, height = map(int, rng.integers(8, 400, size=2))
            color = tuple(map(int, rng.integers(0, 256, size=3)))
            images.append(Image.new("RGB", (width, height), color))
        if rng.random() < 0.25:
            images = [images[0]] * rows
        prompts = ["a " * int(rng.integers(1, 490)) for _ in range(rows)]
        found.append((images, prompts))
    return found


def text_lengths(params: jaxprune.Params, requests: list) -> list[list[int]]:
    """Text tokens of every row of every request."""
    found = []
    for images, prompts in requests:
        request = make_request(params.processor, images, prompts, chat=True)
        found.append([text_length(row) for row in request.rows])
    return found


def padding(config: Any, lengths: list[list[int]], buckets: jaxprune.Buckets) -> float:
    """Multiply-adds of the unpruned prefill as executed, over those of the tokens alone."""
    shapes, visual = Shapes(buckets, config, None), most_tokens(config)
    executed = exact = 0
    for text in lengths:
        slots = sum(shapes.of_rows(max(text), 1, visual, visual))
        executed += buckets.fit("batch", len(text)) * layer_macs(config.text_config, slots, slots)
        exact += sum(layer_macs(config.text_config, n + visual, n + visual) for n in text)
    return executed / exact


def answer_all(params: jaxprune.Params, requests: list) -> dict[str, int]:
    """Warm up all methods with the coarse lists, and let the requests go through them in turn."""
    # Programs hold memory mappings, of which Linux gives a process 65,530.
    jax.clear_caches()
    coarse, reports = buckets_of("coarse"), {}
    for name, options in track(METHODS.items(), "Warming up", console=console):
        fields = {"method": name, **options}
        reports[name] = jaxprune.warmup(params, buckets=coarse, **fields)
    began, kinds = time.perf_counter(), list(METHODS.items())
    with jaxprune.no_compilation() as compilations:
        for number, (images, prompts) in enumerate(track(requests, "Answering", console=console)):
            name, options = kinds[number % len(kinds)]
            fields = {"method": name, **options}
            jaxprune.generate(
                params, images, prompts, max_new_tokens=1 + number % NEW, buckets=coarse, **fields
            )
    answering = time.perf_counter() - began

    print("\n| method | combinations | programs | warm-up, s | of it XLA |")
    print("|---|---:|---:|---:|---:|")
    for name, report in reports.items():
        cells = f"{report.combinations} | {sum(report.programs.values())} | {report.seconds:.0f}"
        print(f"| {name} | {cells} | {report.compile_seconds:.0f} |")
    programs = sum(sum(report.programs.values()) for report in reports.values())
    print(
        f"\n{len(requests)} requests in {answering:.0f} s behind {programs} programs: "
        f"{len(compilations)} compilations."
    )
    return {"compilations": len(compilations), "programs": programs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--sets", nargs="*", default=list(LISTS), choices=list(LISTS))
    parser.add_argument("--lists-only", action="store_true", help="answer no requests")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    args = parser.parse_args()
    params = jaxprune.load()
    requests = random_requests(args.requests)
    rows, lengths = [], text_lengths(params, requests)
    for name in args.sets:
        jax.clear_caches()
        report = jaxprune.warmup(params, buckets=buckets_of(name))
        extra = padding(params.config, lengths, buckets_of(name)) - 1
        rows.append(
            {
                "buckets": name,
                "programs": sum(report.programs.values()),
                "seconds": report.seconds,
                "padding": extra,
            }
        )
        console.print(rows[-1])

    print("| buckets | programs | warm-up, s | padding adds |")
    print("|---|---:|---:|---:|")
    for row in rows:
        cells = f"{row['programs']} | {row['seconds']:.0f} | {100 * row['padding']:.0f} %"
        print(f"| {row['buckets']} | {cells} |")
    found = {} if args.lists_only else answer_all(params, requests)
    if args.json:
        fields = {"lists": rows, **found, "machine": describe_machine()}
        args.json.write_text(json.dumps(fields, indent=1))


if __name__ == "__main__":
    main()
