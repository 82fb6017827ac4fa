"""The rules of scoring: cases by hand, which lmms-eval 0.7.3 scores alike."""

import pytest

from jaxprune.evaluate.scoring import (
    CONTRACTIONS,
    SCORINGS,
    mme_figures,
    pope_figures,
    score,
    textvqa_text,
    vqa_text,
)

TEN = ["red"] * 2 + ["dark red"] * 3 + ["Red."] + ["maroon"] * 4
COLOURS = ["red", "blue", "light blue", "a"]
# rule, answer, reference answers, choices, score
CASES = [
    ("exact", "Red.", ["red"], (), 1),
    ("exact", " red ", ["blue", "Red!"], (), 1),
    ("exact", "it's", ["its"], (), 1),
    ("exact", "dark red", ["red"], (), 0),
    ("exact", "", ["red"], (), 0),
    # Three annotators say red: each of them has two others that agree, each of the rest three.
    ("vqa", "red", TEN, (), (3 * 2 / 3 + 7) / 10),
    ("vqa", "maroon", TEN, (), 1),
    ("vqa", "Dark  red.", TEN, (), (3 * 2 / 3 + 7) / 10),
    ("vqa", "blue", TEN, (), 0),
    ("vqa", "the two dogs", ["2 dogs"] * 10, (), 1),
    ("vqa", "none", ["0"] * 10, (), 1),
    ("vqa", "dont know", ["don't know"] * 10, (), 1),
    ("vqa", "tv/radio", ["tv radio"] * 10, (), 1),
    ("vqa", "tv / radio", ["tv radio"] * 10, (), 1),
    ("vqa", "1,000", ["1000"] * 10, (), 1),
    ("vqa", "a-b 1,000", ["ab 1000"] * 10, (), 1),  # beside a thousand all marks vanish
    ("vqa", "3.5", ["3.5"] * 10, (), 1),
    ("vqa", "3.", ["3"] * 10, (), 1),
    ("vqa", "red\n", ["red"] * 10, (), 1),
    ("vqa", "yes", ["yes"] * 3 + ["no"] * 7, (), (3 * 2 / 3 + 7) / 10),
    ("vqa", "yes", ["yes"] * 2 + ["no"] * 8, (), (2 * 1 / 3 + 8 * 2 / 3) / 10),
    ("vqa", "yes", ["yes"] + ["no"] * 9, (), 9 * 1 / 3 / 10),
    ("vqa", "b,c", ["bc"] * 10, (), 0),
    ("textvqa", "red?", ["red"] * 10, (), 1),
    ("textvqa", "b,c", ["bc"] * 10, (), 1),
    ("textvqa", "joe's", ["joe 's"] * 10, (), 1),
    ("vqa", "joe's", ["joe 's"] * 10, (), 0),
    ("textvqa", "maroon", TEN, (), 1),
    ("textvqa", "red maroon", TEN, (), 0),
    ("pope", "Yes", ["yes"], (), 1),
    ("pope", " no ", ["no"], (), 1),
    ("pope", "Yes.", ["yes"], (), 0),
    ("pope", "Yes, there is", ["yes"], (), 0),
    ("pope", "", ["no"], (), 0),
    ("mme", "Yes.", ["Yes"], (), 1),
    ("mme", "Yes, there is", ["yes"], (), 1),
    ("mme", "Y", ["yes"], (), 1),
    ("mme", "n.", ["No"], (), 1),
    ("mme", "not at all", ["No"], (), 1),
    ("mme", "I say yes", ["Yes"], (), 0),
    ("mme", "maybe", ["No"], (), 0),
    ("choice", "B", ["B"], COLOURS, 1),
    ("choice", "B", ["blue"], COLOURS, 1),
    ("choice", "(B)", ["B"], COLOURS, 1),
    ("choice", "The answer is B.", ["B"], COLOURS, 1),
    ("choice", "Answer :B", ["B"], COLOURS, 1),
    ("choice", "It is red", ["A"], ["red", "green"], 1),
    ("choice", "light blue", ["C"], COLOURS, 0),  # which has "blue" too
    ("choice", "A or B", ["A"], ["red", "green"], 0),
    ("choice", "A dog that is B.", ["B"], ["red", "green"], 1),  # "A" is an article
    ("choice", "A dog", ["A"], ["red", "green"], 1),
    ("choice", "no idea", ["A"], ["red", "green"], 0),
    ("choice", "b", ["B"], ["red", "green"], 0),
    ("scienceqa", "B", ["B"], COLOURS, 1),
    ("scienceqa", "b", ["B"], COLOURS, 1),
    ("scienceqa", "B. blue", ["B"], COLOURS, 1),
    ("scienceqa", "B) blue", ["B"], COLOURS, 0),
    ("scienceqa", "(B)", ["B"], COLOURS, 0),
    ("scienceqa", "blue", ["B"], COLOURS, 0),
]
IDS = [f"{rule}: {said!r} for {answers[0]!r}" for rule, said, answers, _, _ in CASES]


@pytest.mark.parametrize("rule, said, answers, choices, expected", CASES, ids=IDS)
def test_cases(rule, said, answers, choices, expected):
    assert score(rule, said, answers, choices) == pytest.approx(expected)


def test_every_rule_has_cases_of_both_ends():
    for rule in SCORINGS:
        found = {expected for name, *_, expected in CASES if name == rule}
        assert {0, 1} <= found, rule


def test_soft_accuracy_is_the_mean_over_annotators(rng):
    """From the definition, annotator by annotator."""
    words = ["red", "blue", "green"]
    for _ in range(50):
        answers = [words[i] for i in rng.integers(3, size=10)]
        for said in words:
            each = [
                min(1, sum(other == said for j, other in enumerate(answers) if j != i) / 3)
                for i in range(10)
            ]
            assert score("vqa", said, answers) == pytest.approx(sum(each) / 10)


def test_normalisation():
    assert vqa_text("The Cat's, 2 (two) dogs!") == "cat's 2 2 dogs"
    assert textvqa_text("The cat's, 2 dogs?") == "cat 's 2 dogs"
    assert vqa_text("x-ray; tv/radio") == "x ray tv radio"
    assert vqa_text("somebody'd") == "somebodyd"  # sic


def test_contractions_lack_one_apostrophe():
    assert CONTRACTIONS["dont"] == "don't"
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
    for wrong, right in CONTRACTIONS.items():
        assert wrong.replace("'", "") == right.replace("'", "")
    assert len(CONTRACTIONS) == 114


def test_pope_figures():
    truth = ["yes", "yes", "yes", "no", "no"]
    found = pope_figures(["yes", "no", None, "yes", "no"], truth)
    assert found == {
        "accuracy": pytest.approx(2 / 5),
        "precision": pytest.approx(1 / 2),
        "recall": pytest.approx(1 / 2),  # what is neither word is no miss
        "f1": pytest.approx(1 / 2),
        "yes_ratio": pytest.approx(2 / 5),  # of what is said; the truth's is 3/5
    }
    assert set(pope_figures(["no"], ["no"]).values()) == {0.0, 1.0}  # no division by zero


def test_mme_figures():
    found = mme_figures([1, 1, 1, 0, 0, 0], ["a", "b", "b", "a", "c", "c"])
    assert found == {
        "accuracy": pytest.approx(1 / 2),
        "accuracy_plus": pytest.approx(1 / 3),
        "score": pytest.approx(250 / 3),
    }


CHOICES = ["a cat", "a black cat", "dog"]
