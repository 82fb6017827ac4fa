"""What pruning costs and saves on large scenes with small objects, on a small LLaVA-NeXT.

    python examples/train_small_llava_next.py --out runs/small_llava_next     # about an hour
    python benchmarks/high_resolution.py --model runs/small_llava_next

Scenes of 192 pixels whose shapes have half of their usual size: 744 visual tokens, of which the
first 144 show the whole at the resolution of the shipped model. Prints the table of
docs/results.md; recipes are fitted on 64 scenes of the calibration split. Interrupted, the same
command goes on: every measured point is kept in --work.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import numpy as np
from accuracy import by_kind
from results import Store, console, measure

import jaxprune
from jaxprune.calibrate import Sample
from jaxprune.data import scenes
from jaxprune.engine.cost import most_tokens

SIDE, SHRINK = 192, 0.5
BUDGETS = (0.5, 0.25, 0.125)


def pictures(split: str, number: int) -> tuple[list, list[scenes.Question]]:
    """Large scenes and a question about each."""
    pairs = [scenes.sample(split, 1, index) for index in range(number)]
    return [scenes.draw(scene, SIDE, shrink=SHRINK) for scene, _ in pairs], [q for _, q in pairs]


def fitted(params: jaxprune.Params, store: Store, save: float) -> jaxprune.Recipe:
    def make() -> dict:
        images, questions = pictures("calibration", 64)
        samples = [
            Sample(image, q.question, q.answer) for image, q in zip(images, questions, strict=True)
        ]
        options = {"method": "fitprune", "save": save, "batch_size": 8}
        return dataclasses.asdict(jaxprune.calibrate(params, samples, **options))

    return jaxprune.Recipe(**store(f"recipe {save:g}", make))


def twice(name: str, setting: str, **options: int) -> list[tuple[str, str, dict]]:
    """A vision-side method whose tokens are numbered anew, or keep the image's positions."""
    fields = {"method": name, **options}
    own = {**fields, "positions": "original"}
    return [(name, setting, fields), (name, f"{setting}, original positions", own)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/high_resolution"))
    args = parser.parse_args()
    params = jaxprune.load(args.model)
    store = Store(args.work / str(args.scenes))
    images, questions = pictures("held-out", args.scenes)
    small = [
        scenes.draw(scenes.sample("held-out", 1, i)[0], shrink=SHRINK) for i in range(args.scenes)
    ]
    N = most_tokens(params.config)
    settings: list[tuple[str, str, dict]] = [
        ("none", "", {}),
        *twice("prumerge", "adaptive"),
        *twice("prumerge_plus", "adaptive"),
        ("vtw", "half of the layers", {"method": "vtw"}),
    ]
    for budget in BUDGETS:
        keep, label = round(N * budget), f"{100 * budget:g} %"
        for name in ("prumerge", "prumerge_plus", "uniform", "random"):
            settings += twice(name, f"keep {keep}", keep=keep)
        recipe = fitted(params, store, 1 - budget)
        settings.append(("fitprune", f"save {1 - budget:g}", {"method": recipe}))
        if budget < 0.5:
            first, L = 1, params.config.text_config.num_hidden_layers
            rate = (budget * L - first) / (L - first)
            if rate > 0:
                method = jaxprune.FastV(keep_rate=rate, layer=first)
                settings.append(("fastv", f"{label}, from layer {first}", {"method": method}))
    began = time.perf_counter()
    print(f"| method | setting | tokens | FLOPs saved | {' | '.join(scenes.KINDS)} | mean |")
    print(f"|---|---|---:|---:|{'---:|' * (len(scenes.KINDS) + 1)}")
    for name, setting, options in settings:
        point = store(
            f"{name} {setting}", lambda o=options: measure(params, images, questions, **o)
        )
        cells = " | ".join(f"{point[kind]:.3f}" for kind in (*scenes.KINDS, "mean"))
        saved = f"{100 * point['macs_saved']:.1f} %"
        print(f"| {name} | {setting} | {point['tokens']:.0f} | {saved} | {cells} |", flush=True)

    def at_low_resolution() -> dict:
        # What the same objects are to a model that sees 96 pixels.
        answers = jaxprune.generate_many(
            jaxprune.load(),
            [(i, q.question) for i, q in zip(small, questions, strict=True)],
            max_new_tokens=16,
            batch_size=32,
        )
        kinds = by_kind(questions, list(answers))
        return {**kinds, "mean": float(np.mean(list(kinds.values())))}

    point = store("low resolution", at_low_resolution)
    cells = " | ".join(f"{point[kind]:.3f}" for kind in (*scenes.KINDS, "mean"))
    print(f"| none | the shipped model on 96 pixels | 144 | | {cells} |")
    console.print(f"{time.perf_counter() - began:.0f} s on {jax.devices()[0].device_kind}.")


if __name__ == "__main__":
    main()
