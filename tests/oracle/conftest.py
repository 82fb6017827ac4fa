"""The comparisons with PyTorch are left out as a whole where it is not installed."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*.py"]


def pytest_report_header() -> str | None:
    return None if importlib.util.find_spec("torch") else "tests/oracle: left out, torch is missing"
