"""Pruned without training, and after it: how much of the loss comes back, on the shipped model.

    python benchmarks/fine_tuning.py --work runs/fine_tuning      # half an hour on two cores

The model learns drawn scenes again, of the split that it was trained on and never those that it is
asked about, by LoRA with a method's pruning on. Training without pruning stands beside it: what
comes back has to be more than what more training gives anyway. Interrupted, the same command
resumes. Methods have one budget, an eighth of the tokens as the mean over layers, or the nearest
that they have.
"""

import argparse
import json
import pathlib
import statistics

import jax

import jaxprune
from jaxprune.calibrate import Sample
from jaxprune.data import scenes

METHODS = (
    "none",
    "prumerge:keep=17",  # one merged token comes on top
    "prumerge_plus:keep=17",
    "fastv:layer=1;keep_rate=0.01",
    "fitprune:save=0.9",
    "psigmoid:keep_rate=0.27;k=1.0",
)
LEARNED = {
    "rank": 16, "alpha": 32.0, "learning_rate": 2e-3, "projector_rate": 2e-4, "batch_size": 16,
    "micro_batch": 16,
}  # fmt: skip


def learned_scenes(number: int, seed: int) -> list[Sample]:
    """Scenes of the split that is for training, drawn by no other seed."""
    pairs = [scenes.sample("train", 1000 + seed, i) for i in range(number)]
    return [Sample(scenes.draw(scene), asked.question, asked.answer) for scene, asked in pairs]


def accuracy(params: jaxprune.Params, method: str, out: pathlib.Path, samples: int) -> dict:
    """Right answers to held-out scenes under a method, and unpruned."""
    rows = jaxprune.evaluate(
        params, methods=[method], samples=samples, max_new_tokens=8, batch_size=16, out=out
    ).rows
    return {
        "pruned": rows[-1].accuracy, "none": rows[0].accuracy, "visual": rows[-1].visual_tokens
    }  # fmt: skip


def measured(method: str, seed: int, options: argparse.Namespace) -> dict:
    """Accuracy before and after a run."""
    name = method.replace(":", "-").replace(";", "-").replace("=", "")
    place = options.work / f"{name}-{seed}"
    file = options.work / f"{place.name}.json"
    if file.exists():
        return json.loads(file.read_text())
    params = jaxprune.load()
    before = accuracy(params, method, options.work / f"{name}-before.jsonl", options.samples)
    samples = learned_scenes(options.steps * LEARNED["batch_size"], seed)
    done = jaxprune.train(
        params, samples, place, method=method, seed=seed, steps=options.steps, keep=1, **LEARNED
    )
    after = accuracy(done.params, method, options.work / f"{name}-{seed}.jsonl", options.samples)
    last = json.loads((place / "log.jsonl").read_text().splitlines()[-1])
    found = {"before": before, "after": after, "flops": last["flops"]}
    file.write_text(json.dumps(found))
    jax.clear_caches()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/fine_tuning"))
    parser.add_argument("--steps", type=int, default=60, help="updates of 16 scenes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=240, help="held-out scenes")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    table = {
        method: [measured(method, seed, options) for seed in range(options.seeds)]
        for method in METHODS
    }
    whole = table["none"][0]["before"]["none"]
    more = statistics.mean(x["after"]["none"] for x in table["none"])
    flops = table["none"][0]["flops"]
    print(
        "| method | visual tokens into a layer | before | after (seeds) | of the loss comes back "
        "| unpruned after | FLOPs of an update |"
    )
    print("|---|---:|---:|---|---:|---:|---:|")
    for method, runs in table.items():
        before = runs[0]["before"]["pruned"]
        after = [x["after"]["pruned"] for x in runs]
        mean = statistics.mean(after)
        # Against the unpruned model that learned as much.
        back = "" if method == "none" else f"{100 * (mean - before) / (more - before):.0f} %"
        print(
            f"| {method} | {runs[0]['before']['visual']:.1f} | {100 * before:.1f} "
            f"| {100 * mean:.1f} ({', '.join(f'{100 * x:.1f}' for x in after)}) | {back} "
            f"| {100 * statistics.mean(x['after']['none'] for x in runs):.1f} "
            f"| 1 / {flops / runs[0]['flops']:.2f} |"
        )
    print(f"\nUnpruned before {100 * whole:.1f}, after {100 * more:.1f}.")


if __name__ == "__main__":
    main()
