"""How much of an attention is done at once.

Read as attributes of this module when a program is traced, so that one place changes them.
"""

QUERY_CHUNK = 512
"""Queries handled at once: scratch memory is B * H * QUERY_CHUNK * S, not B * H * S * S."""

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
