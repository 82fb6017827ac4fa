"""A few thousand odd inputs; `python -m tests.fuzz` tries more."""

import pytest

from tests import fuzz


@pytest.mark.slow
def test_nothing_but_answers_and_refusals():
    wrong, ended = fuzz.run(3000, seed=0)
    assert not wrong, "\n".join(f"{name} {seed}\n{what}" for name, seed, what in wrong[:5])
    kinds = {name for name, _ in ended}
    assert all(ended[name, "refused"] for name in kinds)
    assert sum(ended[name, "answered"] for name in kinds) > 300  # or this tests nothing
