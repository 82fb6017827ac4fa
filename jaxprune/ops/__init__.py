"""Array operations: jax.numpy only, no Flax, no configs, no models.

Axis letters, here and everywhere: B rows of a batch, I images, N visual tokens of one
image before pruning, K kept ones, S slots of a sequence, T queries, H heads, G query
heads that share one key/value head, C vision width, D decoder width, d width of a head.
"""
