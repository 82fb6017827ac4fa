"""InternVL2, 2.5, 3 and 3.5: an InternViT over tiles, merged patches, a dense decoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxprune.models.family import ModelFiles, VideoForm
from jaxprune.models.internvl import images
from jaxprune.models.internvl.config import PRESETS, InternVLConfig
from jaxprune.models.internvl.modeling import InternVLStages
from jaxprune.models.internvl.prompts import PROMPTS
from jaxprune.models.internvl.publisher import MODEL_TYPE, published_config
from jaxprune.models.internvl.weights import internvl_table
from jaxprune.models.weights import KeyTable

NUM_FRAMES = 8


def frame_numbers(number: int) -> list[int]:
    """Which of a video's frames are seen: the middles of equal parts, as the publisher rounds."""
    each = (number - 1) / NUM_FRAMES
    return [int(each / 2 + round(each * i)) for i in range(NUM_FRAMES)]


class InternVL(InternVLStages):
    """The family of InternVL; see `models.family.Family`."""

    name = InternVLConfig.family
    config = InternVLConfig
    prompts = PROMPTS
    presets: ClassVar = PRESETS
    videos = VideoForm(frame_numbers, text="Frame{i}: ")
    image_processor = staticmethod(images.image_processor)
    image_arguments = staticmethod(images.image_arguments)
    processor_files = staticmethod(images.processor_files)

    def recognises(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json is InternVL's, of the Hub or the publisher's."""
        return fields.get("model_type") in (self.name, MODEL_TYPE)

    def read_config(self, files: ModelFiles) -> InternVLConfig:
        """The config of a directory; see `Family.read_config`."""
        if files.fields.get("model_type") == MODEL_TYPE:
            return published_config(files.fields, dtype=files.dtype)
        fields = {**files.fields, **images.tiles_of(files.path)}
        return InternVLConfig.from_hf(fields, dtype=files.dtype)

    def weights(self, config: InternVLConfig) -> KeyTable:
        """How a model is stored."""
        return internvl_table(config.text_config.model_type)

    def hub_form(self, config: InternVLConfig) -> bool:
        """Always, though the publisher has not converted all of its models."""
        del config
        return True


FAMILY = InternVL()

__all__ = ["FAMILY", "InternVLConfig"]
