"""The recipes that ship for the small model, fitted on drawn scenes of the calibration split.

    python examples/fit_small_recipes.py --out recipes     # about ten minutes

With them `fitprune`, `gsearch` and `psigmoid` work by name on the small model. A file that is
there already is kept, so that an interrupted run resumes.
"""

import argparse
import pathlib

import jaxprune
from jaxprune.progress import track

SAVES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
KEEP_RATES = (0.27, 0.36, 0.5, 0.65)


def wanted() -> dict[str, dict[str, object]]:
    """Settings of the calibration by the name of the recipe's file."""
    fits = {
        f"fitprune-small_llava-{100 * save:.0f}": {"method": "fitprune", "save": save}
        for save in SAVES
    }
    points = {
        f"psigmoid-small_llava-{1000 * rate:.0f}": {
            "method": "psigmoid", "keep_rate": rate, "metric": "logprob",
        }
        for rate in KEEP_RATES
    }  # fmt: skip
    return {**fits, "gsearch-small_llava": {"method": "gsearch", "metric": "logprob"}, **points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a directory for the files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    params = jaxprune.load(dtype="float32")
    settings = wanted()
    for name in track(settings, "Fitting", len(settings)):
        path = args.out / f"{name}.json"
        if not path.exists():
            progress = path.with_suffix(".progress")
            recipe = jaxprune.calibrate(params, progress_file=progress, **settings[name])
            jaxprune.save_recipe(recipe, path)


if __name__ == "__main__":
    main()
