"""Array operations: jax.numpy only, no Flax, no configs, no models.

Shapes are written in the letters of `jaxprune.ops.axes`.
"""
