"""Draw which patches PruMerge and PruMerge+ keep of an image, side by side.

python examples/draw_kept_patches.py --image jaxprune/assets/demo.png --out docs/kept_patches.png
"""

import argparse

from PIL import Image, ImageDraw, ImageFont

import jaxprune
from jaxprune.inputs.images import picture_of
from jaxprune.reports.kept_patches import kept_patches, views

SIDE, GAP, CAPTION = 288, 16, 34


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", default=str(jaxprune.DEMO_IMAGE))
    parser.add_argument("--model", help="model directory; without it, the small model that ships")
    parser.add_argument("--prompt", default="How many objects are there?")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    params = jaxprune.load(args.model)
    seen = views(params, picture_of(args.image))[0]
    panels = []
    for method in ("none", "prumerge", "prumerge_plus"):
        answer = jaxprune.generate(
            params, args.image, args.prompt, method=method, return_details=True
        )
        picture = kept_patches(seen, answer.kept_indices[0], side=SIDE)
        caption = f"{method}: {answer.visual_tokens[0]} tokens, “{answer.text}”"
        panels.append((picture, caption))

    sheet = Image.new("RGB", (3 * SIDE + 4 * GAP, SIDE + 2 * GAP + CAPTION), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(panels):
        left = GAP + i * (SIDE + GAP)
        sheet.paste(picture, (left, GAP))
        canvas.text((left, SIDE + GAP + 6), caption, fill="black", font=ImageFont.load_default(15))
    sheet.save(args.out)


if __name__ == "__main__":
    main()
