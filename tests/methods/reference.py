"""PruMerge and PruMerge+ in NumPy, one image at a time, from the definition.

s: CLS attention, x: features, k: keys. Written to be read, not to be fast.
"""

import math

import numpy as np


def outliers(s):
    q1, q3 = np.percentile(s.astype(np.float32), [25, 75])
    return max(1, int(np.sum(s > q3 + np.float32(1.5) * (q3 - q1))))


def by_score(s):
    return sorted(range(len(s)), key=lambda i: (-s[i], i))


def kept_prumerge(s, keep=None):
    return by_score(s)[: outliers(s) if keep is None else keep]


def kept_prumerge_plus(s, keep=None):
    N = len(s)
    if keep is None:
        kept = by_score(s)[: outliers(s)]
        stride = max(1, (N // len(kept)) // 3)
        return kept + [i for i in range(0, N - 1, stride) if i not in kept]
    kept = by_score(s)[: math.ceil(keep / 2)]
    half = keep // 2
    kept += [i for i in (math.floor((j + 0.5) * N / half) for j in range(half)) if i not in kept]
    for i in by_score(s):
        if len(kept) < keep and i not in kept:
            kept.append(i)
    return kept


def merge(x, s, k, kept, *, mean=False, neighbours=32):
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    tokens = []
    for i in kept:
        similarity = unit @ unit[i]
        others = [j for j in range(len(s)) if j != i]
        near = sorted(others, key=lambda j: (-similarity[j], j))[: min(neighbours, len(s) - 1)]
        token = x[i] + sum(s[j] * x[j] for j in near)
        if mean:
            weights = s[i] + sum(s[j] for j in near)
            token = (s[i] * x[i] + sum(s[j] * x[j] for j in near)) / weights
        tokens.append(token)
    rest = [s[j] * x[j] for j in range(len(s)) if j not in kept]
    tokens.append(sum(rest) if rest else np.zeros_like(x[0]))
    return np.stack(tokens)
