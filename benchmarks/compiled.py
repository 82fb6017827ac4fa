"""What accelerators' own compilers make of a 7B model's programs: bounds, estimates, copies.

    pip install 'jaxprune[tpu-compile]'
    python benchmarks/compiled.py --target v5e --batch 1 --batch 8

No accelerator is needed and nothing is measured but compile times: the estimates are the
compiler's, see docs/devices.md. Prints a Markdown table.
"""

import argparse

import jaxprune
from jaxprune.engine.programs import Sizes
from jaxprune.reports.compiled import compiled

METHODS = {
    "none": {},
    "fitprune": {"save": 0.6},
    "gsearch": {"keep_rates": (1.0,) * 3 + (0.5,) * 13 + (0.1,) * 16},
    "prumerge_plus": {"keep": 144},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", default="v5e")
    parser.add_argument("--model", default="llava-1.5-7b")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    asked = parser.parse_args()
    config = jaxprune.read_config(asked.model)
    heads = ("target", "rows", "method", "program", "bound, ms", "estimate, ms", "ratio",
             "temporary, MB", "copied, MB", "compile, s")  # fmt: skip
    print(f"| {' | '.join(heads)} |")
    print("|---|---:|---|---|---:|---:|---:|---:|---:|---:|")
    for batch in asked.batch or [1]:
        for method in asked.method or ["none", "fitprune", "prumerge_plus"]:
            only = ("prefill", "decode") if method == "none" else ("prefill",)
            found = compiled(
                config, asked.target, method, sizes=Sizes(batch=batch), only=only,
                **METHODS[method],
            )  # fmt: skip
            for stage in found.stages:
                bound, estimate = 1e3 * stage.bound_seconds, 1e3 * (stage.estimated_seconds or 0)
                ratio = max(bound, estimate) / bound
                print(
                    f"| {found.target} | {batch} | {method} | {stage.stage} | {bound:.1f} "
                    f"({stage.bound_by}) | {estimate:.1f} | {ratio:.2f} | "
                    f"{stage.temporary_bytes / 1e6:.0f} | {stage.copied_bytes / 1e6:.0f} | "
                    f"{stage.compile_seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
