"""The README and the pages of docs/: their Python runs, their links lead somewhere.

What a page shows as `python` runs here, block after block in one namespace a page, on the small
model; `py` is for what cannot.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
OF_MODELS = sorted((ROOT / "jaxprune" / "models").glob("*/README.md"))
LINKING = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *PAGES, *OF_MODELS]
MOST_WORDS, MOST_LINES = 1000, 25


def name_of(path):
    return str(path.relative_to(ROOT))


def python_blocks(path):
    """(first line, code) of each block that is to run."""
    text = path.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


LONG = (
    "buckets", "calibrating", "evaluating", "extending", "fine_tuning", "forward", "methods",
    "prompts",
)  # fmt: skip
RUNNING = [
    pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else [], id=name_of(path))
    for path in (README, *PAGES)
    if python_blocks(path)
]


@pytest.mark.parametrize("path", RUNNING)
def test_python_blocks_run(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # some write files
    names = {"__name__": "page"}
    for first, block in python_blocks(path):
        exec(compile("\n" * first + block, str(path), "exec"), names)
    assert capsys.readouterr().err == ""


def test_the_pages_that_show_python_have_it_run():
    assert {p.stem for p in PAGES if python_blocks(p)} >= {
        "buckets", "calibrating", "devices", "extending", "methods",
    }  # fmt: skip
    assert len(python_blocks(README)) >= 3


def anchors(path):
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", LINKING, ids=name_of)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text()))
    for link in (link for link in links if "://" not in link):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_readme_is_short():
    lines = without_code(README.read_text()).splitlines()
    words = " ".join(line for line in lines if not line.startswith("|")).split()
    assert len(words) <= MOST_WORDS


@pytest.mark.parametrize("base", ["VisionMethod", "KeepRates"])
def test_a_method_of_ones_own_is_short(base):
    blocks = [code for _, code in python_blocks(ROOT / "docs" / "extending.md")]
    (example,) = [code for code in blocks if f"(jaxprune.{base})" in code]
    assert len(example.splitlines()) <= MOST_LINES
    compile(example, "extending.md", "exec")
