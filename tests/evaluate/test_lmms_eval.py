"""lmms-eval itself, where it is installed (`make eval-check`): its command line and its scorers.

Its exit code says nothing, so what counts is the file of results.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest

from jaxprune.data.scenes import COLORS
from jaxprune.evaluate import scene_items
from jaxprune.evaluate.scoring import letter_of
from tests.evaluate.test_scoring import CASES

pytest.importorskip("lmms_eval")

# ---- the scorers


def by_lmms_eval(rule, said, answers, choices):
    """The score by lmms-eval, which strips an answer before it scores it."""
    tasks = "lmms_eval.tasks"
    said = said.strip()
    if rule == "exact":
        match = importlib.import_module("lmms_eval.api.metrics").exact_match_hf_evaluate
        plain = {"ignore_case": True, "ignore_punctuation": True}
        return max(match([said], [one], **plain)["exact_match"] for one in answers)
    if rule in ("vqa", "textvqa"):
        name = {"vqa": "vqav2", "textvqa": "textvqa"}[rule]
        module = importlib.import_module(f"{tasks}.{name}.utils")
        each = [{"answer": x, "answer_id": i} for i, x in enumerate(answers)]
        doc: dict = {"question_id": 0, "answers": each if rule == "vqa" else [*answers]}
        return getattr(module, f"{name}_process_results")(doc, [said])["exact_match"]
    if rule in ("pope", "mme"):
        module = importlib.import_module(f"{tasks}.{rule}.utils")
        doc = {"question_id": 0, "answer": answers[0], "category": "color"}
        results = getattr(module, f"{rule}_process_results")(doc, [said])
        return next(iter(results.values()))["score"]
    right = letter_of(answers[0], choices)
    if rule == "scienceqa":
        module = importlib.import_module(f"{tasks}.scienceqa.utils")
        doc = {"choices": choices, "answer": ord(right) - ord("A")}
        return module.sqa_process_results(doc, [said])["exact_match"]
    module = importlib.import_module(f"{tasks}.mmbench.mmbench_evals")
    named = dict(zip("ABCD", choices, strict=False))
    return float(module.MMBench_Evaluator().can_infer(said, named) == right)


def test_the_cases_are_scored_alike():
    wrong = [case for case in CASES if by_lmms_eval(*case[:4]) != pytest.approx(case[4])]
    assert wrong == []


# ---- the command line, on tasks of three kinds from files of three formats

UTILS = """
from PIL import Image
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from lmms_eval.tasks.pope.utils import *

def visual_of_path(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def visual(doc):
    return [doc["image"].convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def chosen(doc, said):
    options = dict(zip("ABCD", doc["choices"]))
    return {"chosen": float(MMBench_Evaluator().can_infer(said[0], options) == doc["answer"])}
"""
COMMON = """
test_split: test
output_type: generate_until
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16, temperature: 0, top_p: 0, num_beams: 1, do_sample: false}
metadata: {version: 0.0}
"""
# As gqa.yaml, pope.yaml and MMBench's static rule have them.
EXACT = """
task: toy_exact
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/exact.jsonl}}
doc_to_visual: !function utils.visual_of_path
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true,
     ignore_case: true, ignore_punctuation: true}
"""
POPE = """
task: toy_pope
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/pope.parquet}}
doc_to_visual: !function utils.visual
process_results: !function utils.pope_process_results
metric_list:
  - {metric: pope_accuracy, aggregation: !function utils.pope_aggregate_accuracy}
  - {metric: pope_precision, aggregation: !function utils.pope_aggregate_precision}
  - {metric: pope_recall, aggregation: !function utils.pope_aggregate_recall}
  - {metric: pope_f1_score, aggregation: !function utils.pope_aggregate_f1_score}
"""
CHOICE = """
task: toy_choice
dataset_path: FOLDER/choice
dataset_kwargs: {load_from_disk: true}
doc_to_visual: !function utils.visual
process_results: !function utils.chosen
metric_list: [{metric: chosen, aggregation: mean, higher_is_better: true}]
"""
TASKS = {"exact": EXACT, "pope": POPE, "choice": CHOICE}
METHODS = {"none": "method=none", "uniform:keep=18": "method=uniform,keep=18"}


def choices_for(answer, number):
    """Four colours, the right one on a place that changes, and its letter."""
    found = [color for color in COLORS if color != answer][:3]
    found.insert(number % 4, answer)
    return found, "ABCD"[number % 4]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """The drawn scenes' questions in a folder, as both programs read them."""
    datasets = importlib.import_module("datasets")
    folder = tmp_path_factory.mktemp("toy")
    items = scene_items(240)
    lines = []
    for number, item in enumerate(items):
        item.image.save(folder / f"{number}.png")
        lines.append({
            "image": str(folder / f"{number}.png"), "question": item.question,
            "answer": item.answers[0], "kind": item.kind, "question_id": str(number),
        })  # fmt: skip
    of = {"exact": lines[:96], "pope": [], "choice": []}
    for line in lines:
        if line["answer"] in ("yes", "no"):
            of["pope"].append(line)
        if line["kind"] == "color":
            options, letter = choices_for(line["answer"], len(of["choice"]))
            of["choice"].append({**line, "choices": options, "answer": letter})
    for name, own in of.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
        (folder / f"{name}.yaml").write_text(
            TASKS[name].replace("FOLDER", str(folder)).strip() + COMMON
        )
    (folder / "utils.py").write_text(UTILS)

    def with_images(name):
        return datasets.Dataset.from_list(of[name]).cast_column("image", datasets.Image())

    with_images("pope").to_parquet(folder / "pope.parquet")
    datasets.DatasetDict({"test": with_images("choice")}).save_to_disk(folder / "choice")
    return folder


def called(*arguments, home):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **offline}, cwd=home,
    )  # fmt: skip
    return done, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def by_harness(questions, tmp_path_factory):
    """For each method the results of `lmms-eval eval`, and for each task its answers."""
    found = {}
    for label, arguments in METHODS.items():
        out = tmp_path_factory.mktemp("lmms-eval")
        _, said = called(
            "lmms_eval", "eval", "--model", "jaxprune", "--model_args", arguments,
            "--tasks", ",".join(f"toy_{name}" for name in TASKS), "--include_path", questions,
            "--batch_size", 4, "--device", "cpu", "--output_path", out / "out", "--log_samples",
            home=out,
        )  # fmt: skip
        files = [*(out / "out").rglob("*_results.json")]
        assert len(files) == 1, said
        answers = {}
        for name in TASKS:
            (file,) = (out / "out").rglob(f"*_samples_toy_{name}.jsonl")
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            lines.sort(key=lambda line: line["doc_id"])
            answers[name] = [line["filtered_resps"] for line in lines]
        found[label] = json.loads(files[0].read_text()), answers
    return found


@pytest.fixture(scope="module")
def by_ourselves(questions, tmp_path_factory):
    """For each task the rows of `jaxprune evaluate --json`, and for each method its answers."""
    found = {}
    for name in TASKS:
        folder = tmp_path_factory.mktemp("jaxprune")
        done, said = called(
            "jaxprune", "evaluate", "--data", questions / f"{name}.jsonl", "--scoring", name,
            "--method", list(METHODS)[1], "--out", folder / "answers.jsonl", "--json",
            home=folder,
        )  # fmt: skip
        assert done.returncode == 0, said
        rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
        answers = {label: [] for label in METHODS}
        for line in map(json.loads, (folder / "answers.jsonl").read_text().splitlines()):
            if "text" in line:
                answers[line["method"]].append(line["text"])
        found[name] = rows, answers
    return found


FIGURES = {
    "exact": {"exact_match": "accuracy"},
    "choice": {"chosen": "accuracy"},
    "pope": {
        "pope_accuracy": "accuracy", "pope_precision": "precision", "pope_recall": "recall",
        "pope_f1_score": "f1",
    },
}  # fmt: skip


@pytest.mark.parametrize("label", METHODS)
@pytest.mark.parametrize("name", TASKS)
def test_figures_and_answers_are_those_of_evaluate(name, label, by_harness, by_ourselves):
    results, answers = by_harness[label]
    rows, own = by_ourselves[name]
    assert answers[name] == own[label] and len(own[label]) >= 40
    row = {**rows[label], **rows[label]["figures"]}
    for theirs, ours in FIGURES[name].items():
        print(f"{name}, {label}: {ours} {row[ours]:.4f} of {len(own[label])}")
        assert results["results"][f"toy_{name}"][f"{theirs},none"] == pytest.approx(row[ours])


def test_pruning_makes_a_difference(by_ourselves):
    """Or equal figures would say nothing about the method."""
    rows, answers = by_ourselves["exact"]
    first, second = METHODS
    assert answers[first] != answers[second]
    assert rows[first]["accuracy"] > rows[second]["accuracy"]


@pytest.mark.parametrize("label", METHODS)
def test_costs_are_those_of_evaluate(label, by_harness, by_ourselves):
    results, answers = by_harness[label]
    questions = {name: len(answers[name]) for name in TASKS}

    def mean(figure):
        rows = {name: by_ourselves[name][0][label] for name in TASKS}
        total = sum(questions[name] * rows[name][figure] for name in TASKS)
        return total / sum(questions.values())

    reported = results["throughput"]
    assert reported["avg_visual_tokens"] == pytest.approx(mean("visual_tokens"))
    assert reported["avg_gflops"] == pytest.approx(2e-9 * mean("macs"))
