"""A LLaMA decoder in plain NumPy: one row, real shapes, tokens deleted one by one.

Written from the methods' description alone, as slow and as explicit as it gets, to hold the
library's schedules against.
"""

from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
    """What there is to see of a layer, beside its attention."""

    before: np.ndarray
    positions: np.ndarray
    k: np.ndarray
    q_plain: np.ndarray
    k_plain: np.ndarray
    after: np.ndarray | None = None
    normed: np.ndarray | None = None


class PlainDecoder:
    def __init__(self, params, config):
        self.p = {
            k: np.asarray(v, np.float64) if not isinstance(v, dict) else v
            for k, v in params.items()
        }
        self.c = config

    def weight(self, *names):
        node = self.p
        for name in names:
            node = node[name]
        return np.asarray(node, np.float64)

    def norm(self, x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c.rms_norm_eps) * scale

    def heads(self, x, layer, name, positions):
        """`[S, D]` -> `[heads, S, d]`, rotated unless these are values."""
        y = x @ self.weight(layer, "self_attn", name, "kernel")
        if self.c.attention_bias:
            y = y + self.weight(layer, "self_attn", name, "bias")
        d = self.c.head_dim
        y = y.reshape(len(x), -1, d).transpose(1, 0, 2)
        if name == "v_proj":
            return y
        inv_freq = self.c.rope_theta ** (-np.arange(0, d, 2) / d)
        angle = np.asarray(positions)[:, None] * inv_freq
        a, b = y[..., : d // 2], y[..., d // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def see(self, x, layer, positions):
        """What a layer's input and its queries and keys are, `[S, D]` and `[heads, S, d]`."""
        y = self.norm(x, self.weight(layer, "input_layernorm", "scale"))
        nowhere = np.zeros(len(x))
        return Seen(
            before=x,
            positions=np.asarray(positions),
            k=self.heads(y, layer, "k_proj", positions),
            q_plain=self.heads(y, layer, "q_proj", nowhere),
            k_plain=self.heads(y, layer, "k_proj", nowhere),
        )

    def attend(self, x, layer, positions, past=None):
        """Attention of new tokens to the past and themselves: output, weights, keys, values."""
        y = self.norm(x, self.weight(layer, "input_layernorm", "scale"))
        q, k, v = (self.heads(y, layer, n, positions) for n in ("q_proj", "k_proj", "v_proj"))
        if past is not None:
            k, v = np.concatenate([past[0], k], 1), np.concatenate([past[1], v], 1)
        group = len(q) // len(k)
        weights = np.zeros((len(q), q.shape[1], k.shape[1]))
        out = np.zeros_like(q)
        for h in range(len(q)):
            for t in range(q.shape[1]):
                seen = k.shape[1] - q.shape[1] + t + 1
                logits = k[h // group, :seen] @ q[h, t] / np.sqrt(self.c.head_dim)
                e = np.exp(logits - logits.max())
                weights[h, t, :seen] = e / e.sum()
                out[h, t] = weights[h, t, :seen] @ v[h // group, :seen]
        joined = out.transpose(1, 0, 2).reshape(len(x), -1)
        return joined @ self.weight(layer, "self_attn", "o_proj", "kernel"), weights, (k, v)

    def feed_forward(self, x, layer):
        y = self.norm(x, self.weight(layer, "post_attention_layernorm", "scale"))
        gate = y @ self.weight(layer, "mlp", "gate_proj", "kernel")
        up = y @ self.weight(layer, "mlp", "up_proj", "kernel")
        return x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(
            layer, "mlp", "down_proj", "kernel"
        )

    def logits(self, x):
        y = self.norm(x, self.weight("norm", "scale"))
        if self.c.tie_word_embeddings:
            return y @ self.weight("embed_tokens", "embedding").T
        return y @ self.weight("lm_head", "kernel")

    def generate(self, x, positions, visual, question, delete, new, renumber=False):
        """Prefill with deletions, then greedy decoding.

        Args:
            x: `[S, D]`.
            visual, question: bool `[S]`; the question includes the last token.
            delete: called as `delete(l, place, weights, visual, question, seen)` with `place`
                "after_attention" or "between_layers", `weights` `[H, s, s]` and what else there
                is to see of the layer, a `Seen`; returns the places, among those there are, to
                delete.
            new: tokens to generate.
            renumber: those that are left take the positions 0, 1, 2 ... after each layer.

        A deletion between layers may give a pair: the places, and new tokens `[c, D]` that stand
        behind the last visual one, at the position of the last that is deleted; their id is -1.

        Returns:
            ids, logits `[new, V]`, the surviving positions behind every layer, cache lengths.
        """
        ids = np.arange(len(x))
        x, visual, question = np.asarray(x, np.float64), visual.copy(), question.copy()
        total = len(x)
        caches, survivors = [], []

        def drop(gone, *arrays):
            stay = np.setdiff1d(np.arange(len(arrays[0])), gone)
            return [a[stay] for a in arrays]

        for l in range(self.c.num_hidden_layers):
            layer = f"layers_{l}"
            seen = self.see(x, layer, positions)
            out, weights, cache = self.attend(x, layer, positions)
            caches.append(cache)
            gone = delete(l, "after_attention", weights, visual, question, seen)
            x, out, ids, positions, visual, question = drop(
                gone, x, out, ids, positions, visual, question
            )
            x = self.feed_forward(x + out, layer)
            if not len(gone):
                seen = seen._replace(after=x, normed=self.norm(x, self.weight("norm", "scale")))
                found = delete(l, "between_layers", weights, visual, question, seen)
                gone, made = found if isinstance(found, tuple) else (found, x[:0])
                behind = np.max(np.nonzero(visual)[0], initial=0) + 1
                place = positions[np.max(gone)] if len(gone) else 0
                x, ids, positions, visual, question = (
                    np.insert(array, [behind] * len(made), value, axis=0)
                    for array, value in ((x, made), (ids, -1), (positions, place),
                                         (visual, True), (question, False))
                )  # fmt: skip
                x, ids, positions, visual, question = drop(
                    gone, x, ids, positions, visual, question
                )
            if renumber:
                positions = np.arange(len(x))
            survivors.append(ids)
        lengths = [cache[0].shape[1] for cache in caches]
        logits = [self.logits(x[-1])]
        answer = [int(np.argmax(logits[-1]))]
        for step in range(new - 1):
            x = self.weight("embed_tokens", "embedding")[answer[-1]][None]
            for l in range(self.c.num_hidden_layers):
                layer = f"layers_{l}"
                at = caches[l][0].shape[1] if renumber else total + step
                out, _, caches[l] = self.attend(x, layer, [at], caches[l])
                x = self.feed_forward(x + out, layer)
            logits.append(self.logits(x[-1]))
            answer.append(int(np.argmax(logits[-1])))
        return answer, np.stack(logits), survivors, lengths


def fitprune(deletions):
    """The smallest u_j c_j go, after the attention."""

    def delete(l, place, weights, visual, question, _seen):
        if place != "after_attention" or not deletions[l]:
            return np.array([], int)
        A = weights.max(axis=0)
        where = np.nonzero(visual)[0]
        u = A[where][:, where].sum(0) / len(where)
        c = A[question][:, where].sum(0)
        order = np.argsort(-(u * c), kind="stable")
        return where[order[len(where) - deletions[l] :]]

    return delete


def keep_rates(rates, number, queries):
    """Before layer l + 1 the best round(r N) stay, by layer l's attention."""

    def delete(l, place, weights, visual, question, _seen):
        if place != "between_layers" or l + 1 >= len(rates):
            return np.array([], int)
        where = np.nonzero(visual)[0]
        rows = weights[:, -1:] if queries == "last" else weights[:, question]
        score = rows.mean(axis=0).mean(axis=0)[where]
        keep = int(np.floor(rates[l + 1] * number + 0.5))
        return where[np.argsort(-score, kind="stable")[keep:]]

    return delete


def interaction(layer, gone, rows, prune_text):
    """Before `layer` the `gone` least important candidates go."""

    def delete(l, place, weights, visual, question, _seen):
        if place != "between_layers" or l != layer - 1:
            return np.array([], int)
        A = weights.mean(axis=0)
        size = len(A)
        candidate = visual | (question if prune_text else False)
        candidate = candidate & (np.arange(size) < size - 1)
        score = np.zeros(size)
        for j in np.nonzero(candidate)[0]:
            later = [t for t in range(j + 1, size) if rows == "all" or question[t]]
            score[j] = np.mean([A[t, j] for t in later])
        where = np.nonzero(candidate)[0]
        return where[np.argsort(-score[where], kind="stable")[len(where) - gone :]]

    return delete
