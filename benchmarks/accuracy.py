"""Accuracy of the shipped model by kind of question, with and without pruning.

    python benchmarks/accuracy.py                     # prints the table, 2,000 scenes
    python benchmarks/accuracy.py --json result.json  # and keeps the numbers

An answer counts when it equals the reference text. The blind baseline gives each question
the answer that was most often right for it in 60,000 training questions, without the image.
"""

import argparse
import collections
import json
import pathlib
import time

import numpy as np
from rich.console import Console
from rich.progress import track

import jaxprune
from jaxprune.data import scenes

BATCH = 64
console = Console(stderr=True)


def blind_answers(questions: list[scenes.Question]) -> list[str]:
    """The best answer to each question from its words alone."""
    exact: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    by_kind: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for index in track(range(60_000), "Training questions", console=console):
        question = scenes.sample("train", 7, index)[1]
        answer = as_choice(question)
        exact[question.question][answer] += 1
        by_kind[question.kind][answer] += 1
    found = []
    for question in questions:
        counter = exact[question.question] or by_kind[question.kind]
        found.append(from_choice(question, counter.most_common(1)[0][0]))
    return found


def as_choice(question: scenes.Question) -> str:
    """A comparison's answer as "first" or "second", so that it carries over to other pairs."""
    if question.kind != "comparison":
        return question.answer
    first = question.question.split(", the ")[1].split(" or the ")[0]
    return "first" if question.answer == first else "second"


def from_choice(question: scenes.Question, choice: str) -> str:
    if question.kind != "comparison":
        return choice
    first, second = question.question.split(", the ")[1].rstrip("?").split(" or the ")
    return first if choice == "first" else second


def by_kind(questions: list[scenes.Question], answers: list[str]) -> dict[str, float]:
    right = {kind: [] for kind in scenes.KINDS}
    for question, answer in zip(questions, answers, strict=True):
        right[question.kind].append(answer == question.answer)
    return {kind: float(np.mean(values)) for kind, values in right.items()}


def ask(params: jaxprune.Params, images: list, questions: list, **method) -> list:
    """All answers in detail."""
    answers = []
    for first in range(0, len(images), BATCH):
        answers += jaxprune.generate(
            params,
            images[first : first + BATCH],
            [question.question for question in questions[first : first + BATCH]],
            max_new_tokens=16,
            return_details=True,
            **method,
        )
    return answers


def row_of(label: str, questions: list, answers: list) -> dict:
    """A row of the table: mean visual tokens and accuracy by kind."""
    tokens = float(np.mean([answer.visual_tokens[0] for answer in answers]))
    texts = [answer.text for answer in answers]
    return {"method": label, "tokens": tokens, **by_kind(questions, texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model directory; without it, the small model that ships")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[72, 36, 18, 9], help="further fixed numbers"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    args = parser.parse_args()

    params = jaxprune.load(args.model)
    pairs = [scenes.sample("held-out", 1, index) for index in range(args.scenes)]
    questions = [question for _, question in pairs]
    images = [scenes.draw(scene) for scene, _ in pairs]

    rows = [{"method": "blind", "tokens": 0.0, **by_kind(questions, blind_answers(questions))}]
    settings: list[dict] = [{"method": "none"}, {"method": "prumerge"}, {"method": "prumerge_plus"}]
    # The adaptive methods' own token counts, then the same for the baselines and for
    # the fixed-size variants (keep + 1 merged token = the baselines' keep).
    began = time.perf_counter()
    for setting in settings:
        label = setting["method"]
        with console.status(f"{label} ..."):
            rows.append(row_of(label, questions, ask(params, images, questions, **setting)))
    own = {round(row["tokens"]) for row in rows[2:]}
    targets = sorted(own | set(args.tokens), reverse=True)
    for target in targets:
        fixed = [
            ("prumerge", {"method": "prumerge", "keep": target - 1}),
            ("prumerge_plus", {"method": "prumerge_plus", "keep": target - 1}),
            ("uniform", {"method": "uniform", "keep": target}),
            *(
                (f"random, seed {s}", {"method": "random", "keep": target, "seed": s})
                for s in range(3)
            ),
        ]
        for label, setting in fixed:
            if setting.get("keep", 1) < 1:
                continue
            with console.status(f"{label}, {target} tokens ..."):
                if setting["method"] == "random":
                    setting = {"method": jaxprune.RandomPlaces(keep=target, seed=setting["seed"])}
                answers = ask(params, images, questions, **setting)
            rows.append(row_of(f"{label}, fixed", questions, answers))
    for row in rows:
        row["mean"] = float(np.mean([row[kind] for kind in scenes.KINDS]))
    rows = merge_seeds(rows)

    columns = [*scenes.KINDS, "mean"]
    print(f"| method | visual tokens | {' | '.join(columns)} |")
    print(f"|---|---:|{'---:|' * len(columns)}")
    for row in rows:
        cells = " | ".join(f"{row[column]:.3f}" for column in columns)
        print(f"| {row['method']} | {row['tokens']:.1f} | {cells} |")
    console.print(f"{args.scenes} scenes, {time.perf_counter() - began:.0f} s of answering.")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def merge_seeds(rows: list[dict]) -> list[dict]:
    """Rows of one setting under several seeds, as their mean."""
    groups: dict[tuple, list[dict]] = collections.defaultdict(list)
    for row in rows:
        name = row["method"].split(", seed")[0]
        name += ", fixed, mean of 3 seeds" if ", seed" in row["method"] else ""
        groups[name, row["tokens"]].append(row)
    return [
        {"method": name}
        | {key: float(np.mean([row[key] for row in group])) for key in group[0] if key != "method"}
        for (name, _), group in groups.items()
    ]


if __name__ == "__main__":
    main()
