"""LLaVA-NeXT in LLaVA's original format."""

from jaxprune.errors import UserError
from jaxprune.models.family import ModelFiles
from jaxprune.models.llava.original import original_arguments
from jaxprune.models.llava_next.config import LlavaNextConfig, pinpoints


def original_config(files: ModelFiles) -> LlavaNextConfig:
    """The config of a model in the original format.

    Raises:
        UserError: for settings that LLaVA-NeXT has not.
    """
    arguments = original_arguments(files)
    merge = files.fields.get("mm_patch_merge_type", "flat")
    if merge != "spatial_unpad":
        raise UserError(
            f"The original-format LLaVA config has mm_patch_merge_type={merge!r}; supported with "
            "tiles: 'spatial_unpad', that of LLaVA-NeXT."
        )
    points = pinpoints(files.fields.get("image_grid_pinpoints"))
    # The original code has (width, height); which of two equally good tilings comes first
    # decides, so their order is kept.
    return LlavaNextConfig(
        **arguments, image_grid_pinpoints=tuple((height, width) for width, height in points)
    )
