"""What 16-bit weights and arithmetic cost in accuracy and give in speed, on the shipped model.

    python benchmarks/precision.py --json precision.json

Every dtype answers the same scenes, unpruned and under two methods. *Same* is the share of
answers equal to those of float32. Times are medians over batches; the dtypes take turns.
"""

import argparse
import json
import pathlib

import numpy as np
from accuracy import BATCH, by_kind
from rich.console import Console
from rich.progress import track

import jaxprune
from jaxprune.checkpoints_convert.load import DTYPES
from jaxprune.data import scenes
from jaxprune.reports.bench import describe_machine

console = Console(stderr=True)
METHODS = {
    "none": {"method": "none"},
    "prumerge_plus": {"method": "prumerge_plus"},
    "pyramiddrop": {"method": "pyramiddrop"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    args = parser.parse_args()
    pairs = [scenes.sample("held-out", 1, index) for index in range(args.scenes)]
    questions = [question for _, question in pairs]
    images = [scenes.draw(scene) for scene, _ in pairs]
    models = {dtype: jaxprune.load(dtype=dtype) for dtype in DTYPES}
    answers: dict[tuple[str, str], list] = {(d, m): [] for d in models for m in METHODS}
    seconds: dict[tuple[str, str], list] = {(d, m): [] for d in models for m in METHODS}
    for first in track(range(0, len(images), BATCH), "Answering", console=console):
        part = slice(first, first + BATCH)
        for (dtype, method), found in answers.items():
            new = jaxprune.generate(
                models[dtype],
                images[part],
                [question.question for question in questions[part]],
                max_new_tokens=16,
                return_details=True,
                **METHODS[method],
            )
            found += [answer.text for answer in new]
            if first:  # the first batch compiles
                seconds[dtype, method].append(sum(new[0].seconds.values()))
    print("| method | dtype | mean accuracy | same | batch of 64, ms | speed-up |")
    print("|---|---|---:|---:|---:|---:|")
    rows = []
    for (dtype, method), found in answers.items():
        base = answers["float32", method]
        spent = float(np.median(seconds[dtype, method]))
        rows.append(
            {
                "method": method,
                "dtype": dtype,
                "accuracy": float(np.mean(list(by_kind(questions, found).values()))),
                "same": float(np.mean([a == b for a, b in zip(found, base, strict=True)])),
                "seconds": spent,
                "speedup": float(np.median(seconds["float32", method])) / spent,
            }
        )
    for row in sorted(rows, key=lambda row: list(METHODS).index(row["method"])):
        print(
            f"| {row['method']} | {row['dtype']} | {row['accuracy']:.3f} | {row['same']:.3f} | "
            f"{1e3 * row['seconds']:.0f} | {row['speedup']:.2f} |"
        )
    console.print(describe_machine())
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "machine": describe_machine()}, indent=1))


if __name__ == "__main__":
    main()
