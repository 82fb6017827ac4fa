"""Functional Flax ports, one folder a model family: `config.py`, `modeling.py`, `README.md`."""
