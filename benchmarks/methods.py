"""Every method at several budgets on the shipped model, with intervals: `jaxprune.evaluate`.

    python benchmarks/methods.py --out /tmp/answers.jsonl        # a quarter of an hour

Interrupted, the same command goes on. Vision-side methods leave 1/2, 1/4, 1/8 and 1/16 of the
image's 144 tokens; decoder-side ones have no such number, and are given shapes that come near.
"""

import argparse
import json
import pathlib
from typing import Any

import jaxprune

BUDGETS = (72, 36, 18, 9)
KEPT = ("fastervlm", "divprune", "scope", "vispruner", "mmtok", "holov", "visionzip")
BASELINES = ("uniform", "random")
CUTS = (1, 2, 4)  # of eight layers, as 3, 7 and 16 are of 32


def vision_side() -> list[str]:
    texts = []
    for keep in BUDGETS:
        texts += [f"{name}:keep={keep}" for name in (*KEPT, *BASELINES)]
        texts.append(f"hiprune:keep={keep};layer=1")  # of five, as 8 is of 24
        # One merged token comes on top.
        texts += [f"{name}:keep={keep - 1}" for name in ("prumerge", "prumerge_plus")]
    return texts


def decoder_side() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    found += [{"method": "fastv", "layer": 1, "keep_rate": rate} for rate in (0.43, 0.14, 0.01)]
    found += [{"method": "psigmoid", "keep_rate": rate, "k": 1.0} for rate in (0.5, 0.36, 0.27)]
    found += [{"method": "fitprune", "save": save} for save in (0.5, 0.7, 0.8, 0.9)]
    found += [{"method": "gsearch"}, {"method": "pyramiddrop"}]
    found += [{"method": "pyramiddrop", "keep_rate": 0.25}]
    found += [{"method": "vtw", "layer": layer} for layer in (4, 2)]
    found += [{"method": "dart", "layer": 1, "tokens": tokens} for tokens in (64, 32, 16)]
    for rates in ((0.5, 0.3, 0.05), (0.28, 0.25, 0.05), (0.05, 0.05, 0.05)):
        found.append({"method": "v2drop", "cut_layers": (1, 4, 6), "keep_rates": rates})
    for version in ("1.5", "plus"):
        for budget in (192, 128, 64):
            found.append(
                {"method": "sparsevlm", "version": version, "budget": budget, "cut_layers": CUTS}
            )
    found.append({"method": "feather", "cut_layers": (2, 4)})
    found.append({"method": "iti"})  # on both sides, as the pairs are
    for first, keep in (("prumerge_plus", 71), ("uniform", 72)):
        found.append({"method": (first, "fitprune"), "keep": keep, "save": 0.5})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=240, help="drawn scenes")
    parser.add_argument("--out", type=pathlib.Path, help="a file of answers, to go on with")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    options = parser.parse_args()
    found = jaxprune.evaluate(
        jaxprune.load(),
        methods=[*vision_side(), *decoder_side()],
        samples=options.samples,
        max_new_tokens=8,
        out=options.out,
    )
    if options.json:
        options.json.write_text(json.dumps(found.as_dict()))
    print("| method | accuracy, % | to none | 95 % | visual tokens into a layer | GFLOPs |")
    print("|---|---:|---:|---|---:|---:|")
    for row in found.rows:
        change = "" if row.difference is None else f"{100 * row.difference:+.1f}"
        low_high = ""
        if row.difference_interval is not None:
            low, high = row.difference_interval
            low_high = f"{100 * low:+.1f} to {100 * high:+.1f}" + (" *" if row.significant else "")
        print(
            f"| {row.method} | {100 * row.accuracy:.1f} | {change} | {low_high} "
            f"| {row.visual_tokens:.1f} | {2e-9 * row.macs:.3f} |"
        )


if __name__ == "__main__":
    main()
