"""How much of an attention is done at once.

Read as attributes of this module when a program is traced, so that one place changes them.
"""


def rows_at_once(heads: int, slots: int) -> int:
    """Rows that are handled at once: keys are read once for each part of their queries, so there
    are as many of these as can be."""
    return max(1, SCORES // (4 * heads * slots * min(QUERY_CHUNK, slots)))


def queries_at_once(rows: int, heads: int, slots: int) -> int:
    """Queries of these rows that are handled at once."""
    return min(QUERY_CHUNK, max(16, SCORES // (4 * rows * heads * slots) // 16 * 16))


QUERY_CHUNK = 512
"""Queries handled at once at most: scratch memory is B * H * QUERY_CHUNK * S, not B * H * S * S."""

SCORES = 64 * 2**20
"""Bytes of float32 scores made at once, as near as whole rows or 16 queries come to it."""

BLOCK = 320
"""Queries of a prompt handled at once on a CPU, for a few heads of one row."""

FULL_BLOCK = 640
"""The same where every query sees every key: with no diagonal, fewer parts are faster."""

SHORT = 128
"""Up to this many slots, all weights of all heads are made at once on every platform: less to
compile."""

STAIRS = 4
"""Parts of a prompt whose queries see only the keys up to the end of their part, on a CPU. More
of them skip more of what lies above the diagonal, and take longer to compile."""
