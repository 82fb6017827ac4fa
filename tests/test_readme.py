"""The README's Python runs as it stands."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
def test_python_blocks_run(block, capsys):
    exec(compile(block, str(README), "exec"), {})
    assert capsys.readouterr().err == ""
