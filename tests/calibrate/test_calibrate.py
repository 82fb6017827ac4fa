"""Calibration end to end on a tiny model; FitPrune's fit against a plain one."""

import dataclasses
import importlib
import itertools
import json

import numpy as np
import pytest

import jaxprune
from jaxprune.calibrate import Sample, calibrate, encode_samples, evaluate, score
from jaxprune.data import scenes
from jaxprune.engine.cost import layer_macs
from jaxprune.inputs.request import Row, make_request
from jaxprune.ops.cuts import LAST, QUESTION, VISUAL
from tests import builders
from tests.builders import start, tiny_config, write_directory
from tests.cases import mostly_slow, picture
from tests.methods.plain_decoder import PlainDecoder

L, N = 4, 16
package = importlib.import_module("jaxprune.calibrate")
QUESTIONS = ["What?", "Where is it?", "How many are there, and why?", "Is it red or is it blue?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "m"
    write_directory(directory, tiny_config(text={"num_hidden_layers": L}), seed=5)
    return jaxprune.load(directory)


@pytest.fixture(scope="module")
def samples():
    return [Sample(picture(i), QUESTIONS[i % 4], ["red", "two of them"][i % 2]) for i in range(8)]


def longest_prefix(score, least):
    """Places, ascending by score, whose removal leaves at least `least`; one stays."""
    order = np.argsort(score, kind="stable")
    best = 0
    for p in range(1, len(score)):
        if score[order[p:]].sum() >= least:
            best = p
    return set(order[:best].tolist())


def plain_fit(model, samples, save):
    """FitPrune's fit for one sample at a time, with explicit deletion."""
    decoder = PlainDecoder(model["language_model"], model.config.text_config)
    prompts = []
    for sample in samples:
        run = start(model, sample.image, sample.question)
        embedded = run.prompt.layout.embedded
        tokens = run.engine.embed(run.prompt, run.seen)
        length = int(embedded.lengths[0])
        prompts.append((np.asarray(tokens.x[0, :length]), embedded.kind[0, :length]))

    def scores(weights, kind):
        A = weights.max(axis=0)
        where = np.nonzero(kind == VISUAL)[0]
        asks = (kind == QUESTION) | (kind == LAST)
        return where, A[asks][:, where].mean(0), A[where][:, where].sum(0) / len(where)

    def walk(x, kind, decide):
        positions = np.arange(len(x))
        for l in range(L):
            out, weights, _ = decoder.attend(np.asarray(x, np.float64), f"layers_{l}", positions)
            where, c, u = scores(weights, kind)
            stay = np.setdiff1d(np.arange(len(x)), where[sorted(decide(l, c, u))])
            x, kind, positions = (x + out)[stay], kind[stay], positions[stay]
            x = decoder.feed_forward(x, f"layers_{l}")

    masses = []
    for x, kind in prompts:
        found = []
        walk(x, kind, lambda l, c, u, found=found: found.append((c.sum(), u.sum())) or [])
        masses.append(found)

    def sizes_of(alpha):
        sizes = np.zeros((L, len(prompts)), int)
        for i, (x, kind) in enumerate(prompts):

            def decide(l, c, u, i=i):
                C, U = masses[i][l]
                both = longest_prefix(c, (1 - alpha) * C) & longest_prefix(u, (1 - alpha) * U)
                sizes[l, i] = len(both)
                return both

            walk(x, kind, decide)
        return sizes

    def scheme(alpha):
        text = model.config.text_config
        sizes = sizes_of(alpha)
        full = L * layer_macs(text, N, N)
        spent, now = 0.0, np.full(len(prompts), N)
        deletions = []
        met = False
        for l in range(L):
            rest = np.mean([(L - l) * layer_macs(text, int(n), int(n)) for n in now])
            met = met or spent + rest <= (1 - save) * full
            gone = np.zeros_like(sizes[l]) if met else sizes[l]
            spent += np.mean(
                [layer_macs(text, int(n), int(n - g)) for n, g in zip(now, gone, strict=True)]
            )
            now = now - gone
            deletions.append(0 if met else int(np.floor(sizes[l].mean())))
        return deletions, met

    low, high, best = 0.0, 1.0, scheme(1.0)
    assert best[1]
    while high - low > 0.01:
        middle = (low + high) / 2
        found = scheme(middle)
        if found[1]:
            high, best = middle, found
        else:
            low = middle
    return best[0], high


@pytest.mark.parametrize("save", mostly_slow([0.3, 0.6], [0.6]))
def test_fitprune_fit_equals_a_plain_one(model, samples, save):
    deletions, alpha = plain_fit(model, samples, save)
    recipe = calibrate(model, samples, method="fitprune", save=save, batch_size=3)
    assert recipe.options["deletions"] == deletions
    assert recipe.calibration["alpha"] == alpha
    assert recipe.reached["save_in_fit"] >= save
    answer = jaxprune.generate(model, picture(0), "What?", method=recipe, return_details=True)
    assert [len(kept[0]) for kept in answer.kept_by_layer.values()] == [
        n for n, t in zip(N - np.cumsum(deletions), deletions, strict=True) if t
    ]


def test_a_budget_out_of_reach_names_the_largest(model, samples):
    with pytest.raises(jaxprune.UserError, match=r"No tolerance saves 0.99 .* the most is 0\.\d+"):
        calibrate(model, samples[:2], method="fitprune", save=0.99)


def test_scores_are_those_of_generation(model, samples):
    """Accuracy of a sample whose answer is what the model says greedily is 1."""
    said = [
        jaxprune.generate(
            model, s.image, s.question, method="gsearch", keep_rates=(1, 0.5, 0.5, 0.25),
            max_new_tokens=8, return_details=True,
        )
        for s in samples[:3]
    ]  # fmt: skip
    data = encode_samples(model, [Sample(s.image, s.question, "x") for s in samples[:3]])
    (batch,) = data.batches
    longest = max(len(answer.token_ids) for answer in said)
    requests = [make_request(model.processor, s.image, s.question, chat=True) for s in samples[:3]]
    rows = [
        Row(r.rows[0].pieces, [i], answer=a.token_ids)
        for i, (r, a) in enumerate(zip(requests, said, strict=True))
    ]
    prompt = data.engine.lay_out(rows, batch.seen, data.room, batch=3, new_slots=0)
    answers = np.full((3, longest), -1, np.int32)
    for i, answer in enumerate(said):
        answers[i, : len(answer.token_ids)] = answer.token_ids
    forced = dataclasses.replace(batch, prompt=prompt, answers=answers)
    data = evaluate.CalibrationSet(data.engine, [forced])
    method = jaxprune.GSearch(keep_rates=(1, 0.5, 0.5, 0.25))
    assert score(data, method) == 1.0
    assert score(data, method, "logprob") < 0


def test_scores_under_both_sides(model, samples):
    """Of a pair too the answer that generation gives is the likeliest."""
    vision, decoder = jaxprune.PruMerge(keep=9), jaxprune.GSearch(keep_rates=(1, 0.5, 0.5, 0.25))
    some = samples[:3]
    said = [
        jaxprune.generate(
            model, s.image, s.question, method=(vision, decoder), max_new_tokens=1,
        )
        for s in some
    ]  # fmt: skip
    data = encode_samples(
        model,
        [dataclasses.replace(s, answer=a or "x") for s, a in zip(some, said, strict=True)],
        method=(vision, decoder),
    )
    assert data.visual_tokens.tolist() == [10] * 3
    both, first = (score(data, m, "logprob") for m in ((vision, decoder), vision))
    assert both != first == score(data, metric="logprob")
    whole = encode_samples(model, some)
    with pytest.raises(jaxprune.UserError, match="not encoded; pass the method to encode_samples"):
        score(whole, (vision, decoder))
    with pytest.raises(jaxprune.UserError, match="without answers"):
        score(encode_samples(model, some, with_answers=False))
    with pytest.raises(jaxprune.UserError, match="Sample 1 is a tuple"):
        calibrate(model, [(some[0].image, "a", "b")], method="fitprune", save=0.3)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gsearch", "metric": "logprob", "tolerance": 0.05},
        {"method": "psigmoid", "keep_rate": 0.7, "metric": "logprob", "evaluations": 6},
        {"method": "gsearch", "search": "bayesian", "metric": "logprob", "evaluations": 4},
        {"method": "iti", "keep_rate": 0.2},
    ],
    ids=["gsearch", "psigmoid", "bayesian", "iti"],
)
def test_recipes_work_and_repeat(model, samples, settings, tmp_path, compilations):
    if settings.get("evaluations"):
        pytest.importorskip("bayes_opt")
    recipe = calibrate(model, samples, batch_size=4, **settings)
    path = tmp_path / "recipe.json"
    jaxprune.save_recipe(recipe, path)
    assert jaxprune.load_recipe(path) == recipe
    answers = [
        jaxprune.generate(model, picture(0), "What?", method=m, max_new_tokens=4)
        for m in (path, str(path), recipe)
    ]
    assert len(set(answers)) == 1
    before = len(compilations)
    again = calibrate(model, samples, batch_size=4, **settings)
    assert again.options == recipe.options
    assert len(compilations) - before <= 4  # the tower, the searches' functions; no schedule
    if settings["method"] == "gsearch" and "search" not in settings:
        assert recipe.reached["score"] >= recipe.reached["unpruned_score"] - 0.05


def interrupt_after(number, monkeypatch):
    """Ctrl-C comes when so many evaluations are done."""
    real, evaluated = package.score, itertools.count()

    def interrupted(*args):
        if next(evaluated) == number:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(package, "score", interrupted)


def test_an_interrupted_search_goes_on(model, samples, tmp_path, monkeypatch):
    settings = {"method": "gsearch", "metric": "logprob", "tolerance": 0.05, "batch_size": 4}
    path = tmp_path / "progress.json"
    real = package.score
    interrupt_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples, progress_file=path, **settings)
    assert len(json.loads(path.read_text())["values"]) == 3
    with pytest.raises(jaxprune.UserError, match="other settings, samples or model"):
        calibrate(model, samples, progress_file=path, **{**settings, "tolerance": 0.1})
    count = []
    monkeypatch.setattr(package, "score", lambda *args: count.append(args) or real(*args))
    recipe = calibrate(model, samples, progress_file=path, **settings)
    assert not path.exists()
    monkeypatch.setattr(package, "score", real)
    whole = calibrate(model, samples, **settings)
    assert recipe.options == whole.options
    assert (
        len(count) == len(set(map(str, count)))
        and len(count) + 3 <= whole.calibration["evaluations"]
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "prumerge"}, "can be calibrated: fitprune"),
        ({"method": "fitprune"}, "needs save"),
        ({"method": "fitprune", "save": 1.5}, "save is 1.5"),
        ({"method": "iti", "save": 0.5}, "needs keep_rate"),
        ({"method": "gsearch", "save": 0.5}, "gsearch has no save"),
        ({"method": "gsearch", "metric": "bleu"}, "accuracy, logprob"),
        ({"method": "gsearch", "tolerance": -1}, "tolerance is -1"),
        ({"method": "gsearch", "first_pruned_layer": 9}, "has 4 layers"),
        ({"method": "gsearch", "colour": 3}, "the settings are: method"),
    ],
)
def test_mistakes(model, samples, settings, message):
    with pytest.raises(jaxprune.UserError, match=message):
        calibrate(model, samples[:1], **settings)


def test_data_files(model, tmp_path):
    picture(0).save(tmp_path / "a.png")
    path = tmp_path / "data.jsonl"
    good = json.dumps({"image": "a.png", "question": "What?", "answer": "red"})
    for text, message in [
        ("", "has no samples"),
        (good + "\n{", "line 2 is not JSON"),
        (json.dumps({"image": "a.png"}), "line 1 is no sample"),
        ("3", "line 1 is no sample"),
        (json.dumps({"image": "a.png", "question": "a", "answer": 3}), "line 1 is no sample"),
        (json.dumps({"image": "b.png", "question": "a", "answer": "b"}), "does not exist"),
    ]:
        path.write_text(text)
        with pytest.raises(jaxprune.UserError, match=message):
            calibrate(model, path, method="fitprune", save=0.3)
    with pytest.raises(jaxprune.UserError, match="does not exist"):
        calibrate(model, tmp_path / "no.jsonl", method="fitprune", save=0.3)
    path.write_text(good + "\n\n" + good)
    assert calibrate(model, path, method="fitprune", save=0.3).calibration["samples"] == 2
    path.write_text(json.dumps({"image": "a.png", "question": "What?"}))
    assert calibrate(model, path, method="fitprune", save=0.3).calibration["samples"] == 1
    with pytest.raises(jaxprune.UserError, match="Sample 1 has no answer"):
        calibrate(model, path, method="psigmoid", keep_rate=0.7)


def test_progress_of_other_answers_is_refused(model, samples, tmp_path, monkeypatch):
    progress = tmp_path / "p.json"
    settings = {"method": "gsearch", "metric": "logprob", "progress_file": progress}
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, samples, **settings)
    assert progress.exists()
    other = [dataclasses.replace(sample, answer="purple, I think") for sample in samples]
    with pytest.raises(jaxprune.UserError, match="other settings, samples or model"):
        calibrate(model, other, **settings)
    asked = [dataclasses.replace(sample, question="Why is it so?") for sample in samples]
    with pytest.raises(jaxprune.UserError, match="other settings, samples or model"):
        calibrate(model, asked, **settings)


def test_a_target_out_of_reach_leaves_no_file(model, samples, tmp_path):
    progress = tmp_path / "p.json"
    with pytest.raises(jaxprune.UserError, match="Ask for less"):
        calibrate(model, samples, method="fitprune", save=0.99, progress_file=progress)
    assert not list(tmp_path.iterdir())
    calibrate(model, samples, method="fitprune", save=0.3, progress_file=progress)


def test_lines_end_at_line_feeds_alone(tmp_path):
    image = tmp_path / "a.png"
    scenes.draw(scenes.sample("calibration", 0, 0)[0]).save(image)
    line = json.dumps(
        {"image": "a.png", "question": "a\u2028b?", "answer": "c"}, ensure_ascii=False
    )
    # With a byte order mark, as some editors write it.
    (tmp_path / "d.jsonl").write_text(line + "\n", encoding="utf-8-sig")
    found = importlib.import_module("jaxprune.data.samples").read_samples(tmp_path / "d.jsonl")
    assert [sample.question for sample in found] == ["a\u2028b?"]


def test_an_answer_is_split_as_behind_its_prompt(tmp_path):
    """A tokenizer that puts a space in front of every text would give it a second one."""
    from tokenizers import normalizers

    from jaxprune.inputs.processor import load_processor
    from jaxprune.inputs.request import make_request

    tokenizer = builders.llama_tokenizer()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    directory, _ = builders.write_original(tmp_path / "m", tmp_path / "t")
    tokenizer.save(str(directory / "tokenizer.json"))
    processor = load_processor(
        directory, dataclasses.replace(builders.tiny_config(), image_token_index=-200)
    )
    image = scenes.draw(scenes.sample("calibration", 0, 0)[0])
    row = make_request(processor, image, "What?", chat=True, answers=["What"]).rows[0]
    pieces = processor.tokenizer.convert_ids_to_tokens(row.answer)
    assert pieces == ["\u2581What", "</s>"]
