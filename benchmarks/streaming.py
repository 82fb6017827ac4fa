"""Does a piece of a stream cost more the longer the answer is?

    python benchmarks/streaming.py --json streaming.json

A small decoder with random weights writes 2,000 tokens through `jaxprune.stream`, one by one.
*Text* is the time in the tokenizer's `decode`, on the host; the rest is the decoder's step and
what goes with it. Times are medians over pieces.
"""

import argparse
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from random_model import random_params

import jaxprune
from jaxprune.models.clip import ClipVisionConfig
from jaxprune.models.llama import LlamaConfig
from jaxprune.models.llava import LlavaConfig
from jaxprune.reports.bench import describe_machine

EACH = 100  # pieces at the beginning, and at the end


def small_config(context: int) -> LlavaConfig:
    vision = ClipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    text = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=320, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=context,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text)


class Timed:
    """A function that adds up its own seconds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **fields: Any) -> Any:
        began = time.perf_counter()
        found = self.function(*args, **fields)
        self.seconds += time.perf_counter() - began
        return found


def seconds_of(pieces: Iterator[str], decode: Timed) -> np.ndarray:
    """Seconds of every piece, and of its text: `[pieces, 2]`."""
    times = [(time.perf_counter(), decode.seconds)]
    for _ in pieces:
        times.append((time.perf_counter(), decode.seconds))
    return np.diff(times, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    args = parser.parse_args()
    params = random_params(small_config(max(4096, 2 * args.tokens)))
    assert params.processor is not None
    tokenizer = params.processor.tokenizer
    tokenizer.decode = decode = Timed(tokenizer.decode)

    def stream() -> Iterator[str]:
        # Drawn, because the likeliest token of random weights may be one without any text.
        fields = {"max_new_tokens": args.tokens, "temperature": 1.0}
        return jaxprune.stream(params, None, "What is there to see?", **fields)

    list(itertools.islice(stream(), 3))  # compiles
    times = seconds_of(stream(), decode)
    rows = {}
    for name, part in (("first", times[:EACH]), ("last", times[-EACH:])):
        whole, text = 1e3 * np.median(part, axis=0)
        rest = 1e3 * np.median(part[:, 0] - part[:, 1])
        rows[name] = {"piece": float(whole), "text": float(text), "rest": float(rest)}
    rows["ratio"] = {key: rows["last"][key] / rows["first"][key] for key in rows["last"]}
    print(f"{args.tokens} tokens in {len(times)} pieces, {times[:, 0].sum():.1f} s.\n")
    print("| pieces | ms a piece | of it text | the rest |\n|---|---:|---:|---:|")
    for name, row in rows.items():
        label = name if name == "ratio" else f"{name} {EACH}"
        print(f"| {label} | {row['piece']:.3f} | {row['text']:.3f} | {row['rest']:.3f} |")
    if args.json:
        fields = {"milliseconds": rows, "pieces": len(times), "machine": describe_machine()}
        args.json.write_text(json.dumps(fields, indent=1))


if __name__ == "__main__":
    main()
