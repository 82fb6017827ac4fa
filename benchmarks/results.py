"""The methods on the shipped model: writes docs/results.md and docs/results.png.

    python benchmarks/results.py                      # 2,000 held-out scenes; about an hour
    python benchmarks/results.py --scenes 200 --out /tmp/results   # a quick look

Interrupted, the same command goes on: every measured point is kept in --work. Recipes are
fitted on drawn scenes of the calibration split, accuracy is of the held-out split; the two
never share a scene.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from accuracy import ask, blind_answers, by_kind
from rich.console import Console
from scipy.stats import kendalltau

import jaxprune
from jaxprune.calibrate import encode_samples, scene_samples
from jaxprune.calibrate.evaluate import CalibrationSet, recorded
from jaxprune.calibrate.fitprune import FitSchedule
from jaxprune.data import scenes
from jaxprune.devices.compilation import Compilations
from jaxprune.engine.cost import most_tokens
from jaxprune.engine.schedules import candidates_left, mask_schedule
from jaxprune.methods import FitPrune, resolve
from jaxprune.models.registry import depth_of
from jaxprune.ops.cuts import ByAttention, Schedule, Score
from jaxprune.reports.recipe_plot import figure

COMMENT = "## What holds, and what does not"
BUDGETS = (0.5, 0.25, 0.125, 0.0625)
console = Console(stderr=True)
COLORS = [
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2"),
    *("#7f7f7f", "#bcbd22", "#17becf", "#000080", "#008060", "#a05000", "#404040"),
]


class Store:
    """Measured points on disk, made once."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.directory / f"{name}.json"
        if not path.exists():
            with console.status(f"{name} ..."):
                made = json.dumps(make())
            path.write_text(made)
        return json.loads(path.read_text())


# ---- accuracy


def measure(params: Any, images: list, questions: list, **method: Any) -> dict[str, Any]:
    """Accuracy by kind; visual tokens that enter the decoder, and a layer; FLOPs saved."""
    answers = ask(params, images, questions, **method)
    kinds = by_kind(questions, [answer.text for answer in answers])
    layers = [answer.cost.visual_per_layer for answer in answers]
    return {
        **kinds,
        "mean": float(np.mean(list(kinds.values()))),
        "entering": float(np.mean([answer.visual_tokens[0] for answer in answers])),
        "tokens": float(np.mean(layers)),
        "macs_saved": float(np.mean([answer.cost.saved["macs"] for answer in answers])),
        "visual_macs_saved": float(np.mean([a.cost.saved["visual_macs"] for a in answers])),
    }


def settings(params: Any, store: Store) -> list[tuple[str, str, dict[str, Any]]]:
    """Every measured point: method, what was set, and the arguments of `generate`.

    Budgets are shares of the visual tokens, averaged over the decoder's layers. A method
    that leaves its first layers whole cannot go below their share; such points are left out.
    """
    N = most_tokens(params.config)
    L = params.config.text_config.num_hidden_layers

    def recipe(**options: Any) -> jaxprune.Recipe:
        name = "recipe " + " ".join(str(value) for value in options.values())

        def make() -> dict[str, Any]:
            jax.clear_caches()  # so that a search's own compilations are counted
            compilations = Compilations()
            made = dataclasses.asdict(jaxprune.calibrate(params, **options))
            made["calibration"]["compilations"] = len(compilations)
            return made

        return jaxprune.Recipe(**store(name, make))

    found: list[tuple[str, str, dict[str, Any]]] = [
        ("none", "", {}),
        ("prumerge", "adaptive", {"method": "prumerge"}),
        ("prumerge_plus", "adaptive", {"method": "prumerge_plus"}),
        ("iti", "c = 4", {"method": "iti"}),
        ("vtw", f"layer {L // 2}", {"method": "vtw"}),
        ("vtw", f"layer {L // 4}", {"method": jaxprune.VTW(layer=L // 4)}),
        ("pyramiddrop", "halves", {"method": "pyramiddrop"}),
        ("pyramiddrop", "quarters", {"method": "pyramiddrop", "keep_rate": 0.25}),
    ]
    for tolerance in (0.0, 0.02, 0.1):
        made = recipe(method="gsearch", tolerance=tolerance)
        found.append(("gsearch", f"tolerance {tolerance:g}", {"method": made}))
    made = recipe(method="gsearch", metric="logprob", tolerance=0.02)
    found.append(("gsearch, logprob", "tolerance 0.02 nats", {"method": made}))
    for budget in BUDGETS:
        keep, label = round(N * budget), f"{100 * budget:g} %"
        found += [
            ("prumerge", f"keep {keep - 1}", {"method": "prumerge", "keep": keep - 1}),
            ("prumerge_plus", f"keep {keep - 1}", {"method": "prumerge_plus", "keep": keep - 1}),
            ("uniform", f"keep {keep}", {"method": "uniform", "keep": keep}),
            *(
                ("random", f"keep {keep}", {"method": jaxprune.RandomPlaces(keep=keep, seed=seed)})
                for seed in range(3)
            ),
        ]
        fitted = recipe(method="fitprune", save=1 - budget)
        found.append(("fitprune", f"save {1 - budget:g}", {"method": fitted}))
        found += iti(recipe, budget, label)
        for first in (2, 1):  # the shallowest cut that can meet the budget
            rate = (budget * L - first) / (L - first)
            if rate > 0:
                fast = jaxprune.FastV(keep_rate=rate, layer=first)
                found.append(("fastv", f"{label}, from layer {first}", {"method": fast}))
                sigmoid = recipe(
                    method="psigmoid", keep_rate=budget, first_pruned_layer=first, evaluations=12
                )
                found.append(("psigmoid", f"{label}, from layer {first}", {"method": sigmoid}))
                break
        # A pair at the budget: half of the way in front of the decoder, half inside it.
        outer = round(N * budget**0.5)
        inner = recipe(method="fitprune", save=round(1 - budget**0.5, 4))
        for name in ("prumerge_plus", "uniform"):
            first = {
                "prumerge_plus": jaxprune.PruMergePlus(keep=outer - 1),
                "uniform": jaxprune.UniformPlaces(keep=outer),
            }[name]
            second = resolve(inner, depth_of(params.config)).decoder
            found.append((f"{name} + fitprune", label, {"method": (first, second)}))
    return found + iti(recipe, 0.22, "22 %")


def iti(recipe: Callable, budget: float, label: str) -> list[tuple[str, str, dict[str, Any]]]:
    """iti at a budget, with the largest second stage that lets the first one meet it."""
    for stage2 in (0.5, 0.25, 0.1, 0.0):
        try:
            made = recipe(method="iti", keep_rate=budget, stage2=stage2)
        except jaxprune.UserError as error:
            console.print(f"iti, {label}, stage 2 removing {stage2:g}: {error}")
            continue
        return [("iti", f"{label}, stage 2 removes {100 * stage2:g} %", {"method": made})]
    return []


# ---- the papers' observations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes(Schedule):
    """Drops nothing; notes down the scores of the visual tokens."""

    def apply(self, cut: str, layer: int, tokens: Any, others: Any, view: Any, counts: Any) -> Any:
        return tokens, others

    def record(self, tokens: Any, view: Any) -> Any:
        return (view.received[0],)


def neighbouring_ranks(data: CalibrationSet) -> list[float]:
    """Kendall's tau of the visual tokens' ranking in each layer and the next, unpruned."""
    L = data.engine.depth.num_hidden_layers
    schedule = Notes(
        layers=tuple(range(L)),
        ranker=ByAttention(Score(queries=("text",))),
        query_slots=data.room.text,
    )
    taus = np.zeros((L - 1, 0))
    for batch, records in recorded(data, schedule, [None] * len(data.batches)):
        rows = []
        for b in range(batch.rows):
            visual = batch.prompt.layout.embedded.visual_index[b] >= 0
            scores = [record[b, visual] for (record,) in records]
            rows.append([kendalltau(scores[l], scores[l + 1])[0] for l in range(L - 1)])
        taus = np.concatenate([taus, np.array(rows).T], axis=1)
    return taus.mean(axis=1).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MassLeft(Schedule):
    """A schedule that notes the attention mass of what it leaves."""

    record = FitSchedule.record


def mass_lost(data: CalibrationSet, method: FitPrune) -> dict[str, float]:
    """Share of the unpruned attention mass that the deleted tokens took along, all layers."""
    depth = data.engine.depth
    plain = mask_schedule(method, depth, data.room)
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(Schedule)}
    zero = np.zeros((depth.num_hidden_layers, data.batches[0].prompt.batch), np.float32)
    nothing_goes = [(np.float32(-1), zero, zero)] * len(data.batches)
    counts = [candidates_left(method, depth, batch.prompt.layout) for batch in data.batches]
    before = recorded(data, FitSchedule(**fields), nothing_goes)
    after = recorded(data, MassLeft(**fields), counts)
    shares: dict[str, list] = {"cross": [], "self": []}
    for (batch, full), (_, left) in zip(before, after, strict=True):
        for place, name in ((1, "cross"), (2, "self")):
            whole = np.stack([record[place] for record in full])[:, : batch.rows]
            rest = np.stack([record[place] for record in left])[:, : batch.rows]
            shares[name].append(1 - rest / whole)
    return {name: float(np.mean(np.concatenate(x, axis=1))) for name, x in shares.items()}


def cls_curve(params: Any) -> list[float]:
    """The sorted CLS attention, mean over calibration images, as shares of its sum."""
    samples = scene_samples()
    signal = jaxprune.Signal("cls_attention", heads="joined")  # as PruMerge and iti read it
    data = encode_samples(params, samples, signals=frozenset({signal}))
    tiles = [b.patches.signals[signal][: b.rows] for b in data.batches]
    s = np.concatenate(tiles)[:, 0]  # of the only tile
    ordered = -np.sort(-s, axis=1)
    return (ordered / ordered.sum(1, keepdims=True)).mean(0).tolist()


def observations(params: Any, store: Store, points: list[dict]) -> dict[str, Any]:
    data = encode_samples(params, scene_samples(), with_answers=False)
    found: dict[str, Any] = {"cls_curve": store("cls curve", lambda: cls_curve(params))}
    found["tau"] = store("kendall tau", lambda: neighbouring_ranks(data))
    for budget in BUDGETS:
        name = f"mass lost {1 - budget:g}"
        recipe = store(f"recipe fitprune {1 - budget:g}", dict)
        method = resolve(jaxprune.Recipe(**recipe), depth_of(params.config)).decoder
        found[name] = store(name, lambda method=method: mass_lost(data, method))
        found[f"fit {1 - budget:g}"] = recipe["calibration"] | recipe["reached"]
    found["gsearch"] = store("recipe gsearch 0.02", dict)["calibration"]
    own = [p for p in points if p["setting"] == "adaptive" and p["method"] == "prumerge"]
    found["compression"] = most_tokens(params.config) / own[0]["entering"]
    return found


# ---- writing


def merged(points: list[dict]) -> list[dict]:
    """Points of one setting under several seeds, as their mean and spread."""
    groups: dict[tuple, list[dict]] = {}
    for point in points:
        groups.setdefault((point["method"], point["setting"]), []).append(point)
    rows = []
    for (method, setting), group in groups.items():
        row = {"method": method, "setting": setting, "seeds": len(group)}
        for key in group[0]:
            if key not in row:
                row[key] = float(np.mean([point[key] for point in group]))
        row["spread"] = float(np.ptp([point["mean"] for point in group]))
        rows.append(row)
    return rows


def plot(rows: list[dict], path: pathlib.Path) -> None:
    made, axes = figure()
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "none"))
    full = next(row for row in rows if row["method"] == "none")
    for i, name in enumerate(names):
        line = sorted((r for r in rows if r["method"] == name), key=lambda r: r["macs_saved"])
        style = {"ls": "--"} if "+" in name else {}
        axes.plot(
            [100 * r["macs_saved"] for r in line],
            [r["mean"] for r in line],
            marker="osD^vP*X"[i % 8],
            ms=4,
            lw=1.2,
            label=name,
            color=COLORS[i % len(COLORS)],
            **style,
        )
    axes.axhline(full["mean"], color="black", lw=0.8, ls=":")
    axes.set(xlabel="decoder FLOPs saved, %", ylabel="accuracy, mean of six kinds")
    axes.legend(fontsize=7, ncols=2)
    made.savefig(path)


def write(rows: list[dict], seen: dict[str, Any], blind: dict, args: Any, seconds: float) -> None:
    kinds = list(scenes.KINDS)
    lines = [
        "# Results on the shipped model",
        "",
        "Made by `python benchmarks/results.py`"
        + (f" with `--scenes {args.scenes}`" if args.scenes != 2000 else "")
        + f": {args.scenes} held-out scenes, recipes fitted on 192 scenes of the calibration "
        "split (no scene is in both). An answer counts when it equals the reference text. "
        "*Tokens* is the mean number of visual tokens that a decoder layer gets, of "
        "144; FLOPs saved are of all tokens in the decoder's layers, by the formula of "
        "`jaxprune cost`. `random` is the mean of three seeds, with the spread of the mean.",
        "",
        "![Accuracy against FLOPs saved](results.png)",
        "",
        f"| method | setting | tokens | FLOPs saved | {' | '.join(kinds)} | mean |",
        f"|---|---|---:|---:|{'---:|' * len(kinds)}---:|",
        "| blind | best answer without the image | | | "
        + " | ".join(f"{blind[k]:.3f}" for k in kinds)
        + f" | {np.mean([blind[k] for k in kinds]):.3f} |",
    ]
    for row in rows:
        spread = f" ± {row['spread'] / 2:.3f}" if row["seeds"] > 1 else ""
        cells = " | ".join(f"{row[kind]:.3f}" for kind in kinds)
        lines.append(
            f"| {row['method']} | {row['setting']} | {row['tokens']:.1f} | "
            f"{100 * row['macs_saved']:.1f} % | {cells} | {row['mean']:.3f}{spread} |"
        )
    curve = np.cumsum(seen["cls_curve"])
    quarter, tenth = len(curve) // 4, len(curve) // 10
    lines += [
        "",
        "## The papers' observations, on this model",
        "",
        f"- **CLS attention is long-tailed** (PruMerge, iti): the top 10 % of the patches hold "
        f"{100 * curve[tenth - 1]:.0f} % of it, the top 25 % hold "
        f"{100 * curve[quarter - 1]:.0f} %; an even spread would give 10 and 25 %.",
        f"- **Adaptive PruMerge** keeps {144 / seen['compression']:.1f} of 144 tokens on average, "
        f"a compression of {seen['compression']:.1f}; the paper has 14.4 on LLaVA-1.5.",
        "- **Rankings hardly change from layer to layer** (G-Search): Kendall's tau between "
        "neighbouring layers, unpruned, mean over samples: "
        + ", ".join(f"{l}-{l + 1} {tau:.2f}" for l, tau in enumerate(seen["tau"]))
        + ".",
        "- **Attention mass lost** under each FitPrune recipe, mean over layers and samples "
        "(cross: from the text, self: among visual tokens):",
        "",
        "| save | cross | self | tolerance alpha | saved in the fit | after flooring | fit took |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for budget in BUDGETS:
        lost, fit = seen[f"mass lost {1 - budget:g}"], seen[f"fit {1 - budget:g}"]
        lines.append(
            f"| {1 - budget:g} | {100 * lost['cross']:.1f} % | {100 * lost['self']:.1f} % | "
            f"{fit['alpha']:.3f} | {fit['save_in_fit']:.3f} | {fit['save']:.3f} | "
            f"{fit['seconds']:.0f} s |"
        )
    search = seen["gsearch"]
    lines += [
        "",
        f"A whole G-Search (accuracy, tolerance 0.02): {search['evaluations']} evaluations, "
        f"{search['compilations']} XLA compilations, {search['seconds']:.0f} s.",
    ]
    path = args.out / "results.md"
    # What a person made of the numbers stays; look at it again when they change.
    comment = path.read_text().partition(COMMENT)[2] if path.exists() else "\n"
    path.write_text("\n".join([*lines, "", COMMENT]) + comment)
    console.print(f"{args.out / 'results.md'}: {len(rows)} settings, {seconds:.0f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"))
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/results"))
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here too")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    params = jaxprune.load()
    store = Store(args.work / str(args.scenes))
    pairs = [scenes.sample("held-out", 1, index) for index in range(args.scenes)]
    questions = [question for _, question in pairs]
    images = [scenes.draw(scene) for scene, _ in pairs]
    blind = store("blind", lambda: by_kind(questions, blind_answers(questions)))

    chosen = settings(params, store)
    points = []
    for i, (method, setting, options) in enumerate(chosen):
        seed = getattr(options.get("method"), "seed", 0) if method == "random" else 0
        name = f"{method}, {setting}, {seed}".replace("/", " ")
        found = store(name, lambda options=options: measure(params, images, questions, **options))
        points.append({"method": method, "setting": setting, **found})
        console.print(
            f"{i + 1}/{len(chosen)} {name}: {found['mean']:.3f} at {found['tokens']:.1f} tokens"
        )
    rows = merged(points)
    seen = observations(params, store, points)
    plot(rows, args.out / "results.png")
    write(rows, seen, blind, args, time.perf_counter() - began)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "observations": seen}, indent=1))


if __name__ == "__main__":
    main()
