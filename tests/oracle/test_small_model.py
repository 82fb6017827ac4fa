"""The shipped model: `transformers` loads it and answers exactly as jaxprune does."""

import chex
import numpy as np
import pytest
import torch
import transformers

import jaxprune
from jaxprune.engine.answer import answers_of
from tests.builders import start


@pytest.fixture(scope="module")
def reference():
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        jaxprune.SMALL_MODEL, dtype=torch.float32
    ).eval()
    return model, transformers.AutoProcessor.from_pretrained(jaxprune.SMALL_MODEL)


@pytest.mark.slow
def test_twenty_scenes(reference, small_model, held_out):
    model, processor = reference
    for image, question in held_out:
        # Enlarged, so that the processors have something to resize.
        image = image.resize((250, 180))
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].numpy()
            ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        new = ids[0, inputs.input_ids.shape[1] :].tolist()

        run = start(small_model, image, question.question, max_new_tokens=20)
        assert answers_of(run)[0].prompt_tokens == inputs.input_ids.shape[1]
        chex.assert_trees_all_close(np.asarray(run.first_logits[0]), logits, atol=1e-4)

        answer = jaxprune.generate(
            small_model, image, question.question, max_new_tokens=20, return_details=True
        )
        assert [*answer.token_ids, 2][: len(new)] == new
        assert answer.text == processor.decode(new, skip_special_tokens=True).strip()


def test_several_turns_are_rendered_alike(reference, small_model):
    _, processor = reference
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "Two?"}]},
    ]
    expected = processor.apply_chat_template(turns, add_generation_prompt=True)
    from jaxprune.inputs.prompts import as_messages, render

    assert render(small_model.processor, as_messages(turns, [None])[0]) == expected


@pytest.mark.parametrize(
    "size", [(96, 96), (1, 1), (3, 3), (1, 3), (640, 480), (97, 301), (2000, 40)]
)
def test_pixels_equal_the_reference_processor(reference, small_model, size, rng):
    from PIL import Image

    from jaxprune.inputs.images import load_image
    from jaxprune.inputs.pixels import pixel_values

    _, processor = reference
    array = rng.integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(array)
    expected = processor.image_processor(
        array, input_data_format="channels_last", return_tensors="np"
    )["pixel_values"]
    found = pixel_values(small_model.processor, [load_image(image)], small_model.config)
    chex.assert_trees_all_close(found.transpose(0, 3, 1, 2), expected, atol=1e-6)
