"""What an answer is worth, by the rules that benchmarks publish: functions of texts alone.

    exact      a reference answer, but for case and punctuation (GQA and most others)
    vqa        VQAv2: the mean over the annotators of min(1, agreeing others / 3)
    textvqa    the same with TextVQA's normalisation, which VizWiz has too
    pope       "yes" or "no", nothing more; with precision, recall and F1 (arXiv 2305.10355)
    mme        yes or no in the answer's first four letters; also by pairs (arXiv 2306.13394)
    choice     the letter or the text of an option, wherever it stands (MMBench)
    scienceqa  the letter alone, or in front with a full stop (LLaVA's rule for ScienceQA)

Each gives the number of lmms-eval 0.7.3 on the same answer, oddities included: POPE's "Yes." is
wrong, and an answer that is neither word is not a miss in its recall. The normalisation of VQA is
the official evaluation's (Antol et al., arXiv 1505.00468; github.com/GT-Vision-Lab/VQA).
"""

import re
import string
from collections.abc import Callable, Hashable, Sequence

import numpy as np

SCORINGS = ("exact", "vqa", "textvqa", "pope", "mme", "choice", "scienceqa")
YES_NO = ("pope", "mme")
VOTES = ("vqa", "textvqa")
CHOICES = ("choice", "scienceqa")
FEWEST_VOTES = 4
"""With fewer annotators nothing scores 1."""


def score(
    scoring: str, answer: str, references: Sequence[str], choices: Sequence[str] = ()
) -> float:
    """What an answer is worth, 0 to 1, under one of `SCORINGS`."""
    if scoring in VOTES:
        return soft_accuracy(answer, references, vqa_text if scoring == "vqa" else textvqa_text)
    if scoring in CHOICES:
        found = chosen(answer, choices) if scoring == "choice" else letter_in_front(answer)
        return float(found is not None and found == letter_of(references[0], choices))
    if scoring in YES_NO:
        return float(said_word(scoring, answer) == truth_of(references[0]))
    return exact_match(answer, references)


# ---- exact match

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 for the text of any reference, case and punctuation aside; else 0."""
    return float(_plain(answer) in {_plain(reference) for reference in references})


def _plain(text: str) -> str:
    return text.strip().lower().translate(_PUNCTUATION)


# ---- the soft accuracy of visual question answering

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_POINT = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,+\d")
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"} | {
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"
}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
# What annotators leave out is one apostrophe; the official table has one entry the wrong way.
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _WITH_APOSTROPHES.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_text(text: str) -> str:
    """An answer as VQAv2's evaluation compares it."""
    return _words(_without_marks(re.sub(r"[\n\t]", " ", text).strip()))


def textvqa_text(text: str) -> str:
    """An answer as TextVQA's evaluation compares it: commas and question marks go first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_text(text)


def _without_marks(text: str) -> str:
    """Marks at a word's edge vanish and others part words; all vanish beside 1,000."""
    found, thousands = text, _THOUSANDS.search(text)
    for mark in _MARKS:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if at_an_edge or thousands else " ")
    return _POINT.sub("", found)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, references: Sequence[str], normalise: Callable[[str], str]) -> float:
    """min(1, others who said it / 3), averaged over leaving each annotator out."""
    agree = np.array([normalise(reference) for reference in references]) == normalise(answer)
    others = agree.sum() - agree  # each annotator is compared with all but themselves
    return float(np.minimum(1, others / 3).mean())


# ---- yes or no


def truth_of(reference: str) -> str:
    """A reference answer as "yes" or "no"."""
    return reference.strip().lower().rstrip(".")


def said_word(scoring: str, answer: str) -> str | None:
    """ "yes" or "no", by POPE's rule or MME's; None for neither."""
    return pope_word(answer) if scoring == "pope" else mme_word(answer)


def pope_word(answer: str) -> str | None:
    """The bare word, as lmms-eval wants it."""
    word = answer.strip().lower()
    return word if word in ("yes", "no") else None


def mme_word(answer: str) -> str | None:
    """The word that the first four characters have, or a bare "y" or "n" begins."""
    text = answer.strip().lower().replace(".", "")
    start = {"y": "yes", "n": "no"}.get(text, text[:4])
    return "yes" if "yes" in start else "no" if "no" in start else None


def pope_figures(said: Sequence[str | None], truth: Sequence[str]) -> dict[str, float]:
    """POPE's figures, yes being what is looked for; a share of nothing is 0.

    Args:
        said: "yes", "no", or None for any other answer, which is wrong and finds nothing.
        truth: "yes" or "no".

    Returns:
        "accuracy", "precision", "recall", "f1" and "yes_ratio": how often the model says yes
        (lmms-eval gives how often it should). F1 is that of all questions together; LLaVA's
        papers average those of the three subsets.
    """
    pairs = list(zip(said, truth, strict=True))
    found = pairs.count(("yes", "yes"))
    claimed = sum(word == "yes" for word in said)
    # What is neither word is no miss, as lmms-eval has it.
    precision, recall = _share(found, claimed), _share(found, found + pairs.count(("no", "yes")))
    return {
        "accuracy": _share(sum(a == b for a, b in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(claimed, len(pairs)),
    }


def mme_figures(scores: Sequence[float], pairs: Sequence[Hashable]) -> dict[str, float]:
    """MME's figures of one category.

    Args:
        scores: 1 for a right answer, 0 for a wrong one.
        pairs: which two questions are about the same image.

    Returns:
        "accuracy", "accuracy_plus": the share of pairs whose questions are both right, and
        "score": 100 times their sum, what MME adds up over categories.
    """
    right: dict[Hashable, float] = {}
    for score, pair in zip(scores, pairs, strict=True):
        right[pair] = min(score, right.get(pair, 1.0))
    accuracy, both = _share(sum(scores), len(scores)), _share(sum(right.values()), len(right))
    return {"accuracy": accuracy, "accuracy_plus": both, "score": 100 * (accuracy + both)}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# ---- multiple choice

_AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
"""What may stand before and after a letter, in the order of MMBench's matching."""


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of a reference answer, which is a letter or a choice; None where it is neither."""
    letters = string.ascii_uppercase[: len(choices)]
    by_text = [letter for letter, text in zip(letters, choices, strict=True) if text == answer]
    named = answer.strip().upper()
    found = {*by_text, *([named] if len(named) == 1 and named in letters else [])}
    return found.pop() if len(found) == 1 else None


def chosen(said: str, choices: Sequence[str]) -> str | None:
    """The letter of what an answer names: one letter among its words, else one choice's text."""
    letters, words = string.ascii_uppercase[: len(choices)], said.split()
    # A word "A" in a longer sentence is taken for the article.
    bare = () if "A" in words and len(words) > 3 else (("", ""),)
    for before, after in (*bare, *_AROUND):
        found = [letter for letter in letters if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    pairs = zip(letters, choices, strict=True)
    named = [letter for letter, text in pairs if text.lower() in said.lower()]
    return named[0] if len(named) == 1 else None


def letter_in_front(answer: str) -> str:
    """The letter that an answer is, or begins with before a full stop; else the answer."""
    text = answer.strip()
    return (text[:1] if text[:1].isupper() and text[1:2] == "." else text).upper()
