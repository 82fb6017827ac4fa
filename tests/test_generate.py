import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.inputs.prompts import as_messages, render
from jaxprune.methods.counted import Counted
from jaxprune.models.registry import family_of
from tests import builders
from tests.builders import start
from tests.cases import FEW, METHODS, mostly_slow, options_of, picture


@pytest.fixture(scope="module")
def five():
    prompts = ["What?", "Where is the red circle, and why?", "a b c", "Is there a star?", "Hm"]
    return [picture(i) for i in range(5)], prompts


QUICK = ["prumerge", "fitprune", "adaptive pair"]


@pytest.mark.parametrize("name", mostly_slow(METHODS, QUICK))
def test_a_row_is_the_same_alone_in_a_batch_and_in_another_order(name, tiny_model, five):
    images, prompts = five
    options = {"buckets": FEW, **options_of(name)}
    batch = start(tiny_model, images, prompts, **options)
    order = [3, 0, 4, 2, 1]
    mixed = start(tiny_model, [images[i] for i in order], [prompts[i] for i in order], **options)
    texts = jaxprune.generate(tiny_model, images, prompts, max_new_tokens=8, **options)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone = start(tiny_model, image, prompt, **options)
        chex.assert_trees_all_close(batch.first_logits[i], alone.first_logits[0], atol=1e-4)
        place = order.index(i)
        chex.assert_trees_all_close(mixed.first_logits[place], alone.first_logits[0], atol=1e-4)
        answer = jaxprune.generate(tiny_model, image, prompt, max_new_tokens=8, **options)
        assert answer == texts[i]
    if batch.engine.plan.decoder is not None:
        masked = start(tiny_model, images, prompts, gather=False, **options)
        assert masked.prompt.schedule.lengths is None
        chex.assert_trees_all_close(batch.first_logits, masked.first_logits, atol=1e-4)


COUNTED = [name for name in METHODS if issubclass(jaxprune.METHODS.get(name, type), Counted)]


@pytest.mark.parametrize("name", mostly_slow(COUNTED, ["uniform", "divprune"]))
def test_keeping_everything_is_no_pruning(name, tiny_model):
    kept = start(tiny_model, picture(1), "What?", **{**options_of(name), "keep": 16})
    full = start(tiny_model, picture(1), "What?")
    chex.assert_trees_all_close(kept.first_logits, full.first_logits, atol=1e-5)


# Others leave the same caches behind as some of these.
CACHES = [*QUICK, "gsearch, renumbered", "vtw", "visionzip", "sparsevlm, renumbered", "pair"]


@pytest.mark.parametrize("name", mostly_slow(METHODS, CACHES))
def test_decoding_continues_what_prefill_would_give(name, tiny_model):
    """The logits behind n generated tokens equal those of a prompt that holds them."""
    options = {"buckets": FEW, **options_of(name)}
    run = start(tiny_model, picture(2), "What is it?", max_new_tokens=6, **options)
    run.advance(5)
    ids = run.tokens[0, : run.lengths[0]].tolist()
    assert len(ids) > 1  # or this tests nothing
    decode = jax.jit(family_of(tiny_model.config).decode, static_argnums=1)
    state = start(tiny_model, picture(2), "What is it?", max_new_tokens=6, **options).state
    for n in range(1, len(ids)):
        said = jnp.asarray(ids[n - 1 : n])
        logits, caches = decode(
            tiny_model.arrays, tiny_model.config, said, state.positions, state.caches,
            np.int32(n - 1), np.arange(state.tokens.shape[1])[None] < n - 1,
        )  # fmt: skip
        state = state._replace(caches=caches, positions=state.positions + 1)
        longer = start(tiny_model, picture(2), "What is it?", answers=[ids[:n]], **options)
        chex.assert_trees_all_close(logits, longer.first_logits, atol=1e-4)
        assert int(np.argmax(logits[0])) == ids[n]


def test_full_select_strategy_keeps_cls_in_front(tmp_path):
    directory = tmp_path / "full"
    config = builders.tiny_config(vision_feature_select_strategy="full")
    builders.write_directory(directory, config)
    model = jaxprune.load(directory)
    answer = jaxprune.generate(
        model, picture(0), "What?", method="uniform", keep=4, max_new_tokens=2, return_details=True
    )
    assert answer.visual_tokens == [5]
    assert answer.unpruned_visual_tokens == [17]
    assert answer.kept_indices[0].tolist() == [2, 6, 10, 14]
    for method in ("prumerge", "prumerge_plus"):
        jaxprune.generate(model, picture(0), "What?", method=method, max_new_tokens=2)
    everything = start(model, picture(0), "What?", method="uniform", keep=16)
    unpruned = start(model, picture(0), "What?")
    chex.assert_trees_all_close(everything.first_logits, unpruned.first_logits, atol=1e-5)


def test_details(tiny_model):
    answer = jaxprune.generate(
        tiny_model, picture(0), "What?", method="prumerge", keep=3, return_details=True,
        max_new_tokens=4,
    )  # fmt: skip
    assert answer.visual_tokens == [4]
    assert answer.unpruned_visual_tokens == [16]
    assert answer.kept_indices[0].tolist()[-1] == -1
    assert len(answer.token_ids) <= 4
    assert set(answer.seconds) == {"preprocess", "encode", "select", "prefill", "decode"}
    assert answer.text == jaxprune.generate(
        tiny_model, picture(0), "What?", method=jaxprune.PruMerge(keep=3), max_new_tokens=4
    )


def test_inputs_of_every_sort_agree(tiny_model, tmp_path):
    image = picture(3)
    path = tmp_path / "image.png"
    image.save(path)
    answers = {
        jaxprune.generate(tiny_model, form, "What?", max_new_tokens=6)
        for form in (image, path, str(path), np.asarray(image))
    }
    assert len(answers) == 1
    answer = answers.pop()
    as_list = jaxprune.generate(tiny_model, [image], ["What?"], max_new_tokens=6)
    assert as_list == [answer]
    assert jaxprune.generate(tiny_model, [image, image], "What?", max_new_tokens=6) == [answer] * 2
    assert jaxprune.generate(tiny_model, image, ["What?"] * 3, max_new_tokens=6) == [answer] * 3
    array = np.stack([np.asarray(image)] * 2)
    assert jaxprune.generate(tiny_model, array, "What?", max_new_tokens=6) == [answer] * 2
    bare = jaxprune.generate(
        tiny_model.arrays, image, "What?", max_new_tokens=6,
        config=tiny_model.config, processor=tiny_model.processor,
    )  # fmt: skip
    assert bare == answer
    moved = jax.tree.map(lambda x: x, tiny_model)
    assert jaxprune.generate(moved, image, "What?", max_new_tokens=6) == answer


def test_conversations_and_placeholders(tiny_model):
    image = picture(3)
    plain = jaxprune.generate(tiny_model, image, "What?", max_new_tokens=6)
    turn = [{"role": "user", "content": "What?"}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    for prompt in (turn, parts, "<image>\nWhat?"):
        assert jaxprune.generate(tiny_model, image, prompt, max_new_tokens=6) == plain
    raw = "USER: <image>\nWhat? ASSISTANT:"
    assert jaxprune.generate(tiny_model, image, raw, chat=False, max_new_tokens=6) == plain
    turns = [*turn, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    text = render(tiny_model.processor, as_messages(turns, [None])[0])
    raw = jaxprune.generate(tiny_model, image, text, chat=False, max_new_tokens=6)
    assert jaxprune.generate(tiny_model, image, turns, max_new_tokens=6) == raw
    batch = jaxprune.generate(tiny_model, [image, None], [turns, turn], max_new_tokens=6)
    assert len(batch) == 2


def test_several_images_in_a_prompt(tiny_model):
    a, b = picture(1), picture(2)
    details = jaxprune.generate(
        tiny_model, [a, b], "<image> and <image>", return_details=True, max_new_tokens=2
    )
    assert details.visual_tokens == [16, 16]
    nested = jaxprune.generate(tiny_model, [[a, b], a], ["Which?", "What?"], max_new_tokens=2)
    assert len(nested) == 2
    ab, ba = (start(tiny_model, [pair], ["Which?"]) for pair in ([a, b], [b, a]))
    assert np.abs(np.asarray(ab.first_logits - ba.first_logits)).max() > 1e-3


def test_a_list_of_images_beside_a_conversation(tiny_model):
    a, b = picture(1), picture(2)
    one = {"type": "image"}
    turn = [{"role": "user", "content": [one, {"type": "text", "text": "What?"}]}]
    expected = jaxprune.generate(tiny_model, a, turn, max_new_tokens=4)
    assert jaxprune.generate(tiny_model, [a], turn, max_new_tokens=4) == [expected]
    both = [{"role": "user", "content": [one, one, {"type": "text", "text": "Which?"}]}]
    details = jaxprune.generate(tiny_model, [a, b], both, max_new_tokens=4, return_details=True)
    assert details.visual_tokens == [16, 16]


def test_rows_that_pad_the_batch_do_not_prolong_it(small_model, held_out):
    images = [image for image, _ in held_out[:3]]
    run = start(small_model, images, "Is there a red star?", max_new_tokens=16)
    run.advance(15)
    assert run.done.all()
    assert run.step.max() < 8


def test_random_takes_the_seed(tiny_model):
    kept = [
        jaxprune.generate(
            tiny_model, picture(0), "What?", method="random", keep=5, seed=seed,
            return_details=True, max_new_tokens=1,
        ).kept_indices[0].tolist()
        for seed in (0, 1)
    ]  # fmt: skip
    assert kept[0] != kept[1]
    same = jaxprune.generate(
        tiny_model, picture(0), "What?", method="random", keep=5, seed=np.int64(1),
        return_details=True, max_new_tokens=1,
    ).kept_indices[0].tolist()  # fmt: skip
    assert same == kept[1]
    with pytest.raises(jaxprune.UserError, match="several seeds"):
        jaxprune.generate(
            tiny_model, [picture(0)] * 2, ["a", "b"], method="random", keep=5, seed=[1, 2]
        )


def test_an_image_twice_in_a_prompt_is_two(tiny_model):
    image = picture(0)
    answer = jaxprune.generate(
        tiny_model, [[image, image]], ["<image><image> hm?"], method="fastv", layer=1,
        return_details=True, max_new_tokens=1,
    )[0]  # fmt: skip
    assert sum(len(kept) for kept in answer.kept_by_layer[0]) == 16


def test_text_alone(tiny_model):
    answer = jaxprune.generate(tiny_model, None, "Hello", max_new_tokens=5, return_details=True)
    assert answer.visual_tokens == []
    mixed = jaxprune.generate(tiny_model, [None, picture(0)], ["Hello", "What?"], max_new_tokens=5)
    assert mixed[0] == answer.text
    pruned = jaxprune.generate(tiny_model, None, "Hello", method="prumerge", max_new_tokens=5)
    assert pruned == answer.text


def test_stream_joins_to_the_answer(tiny_model):
    for chunk in (1, 3):
        pieces = list(
            jaxprune.stream(tiny_model, picture(4), "What?", max_new_tokens=9, chunk_tokens=chunk)
        )
        assert "".join(pieces) == jaxprune.generate(
            tiny_model, picture(4), "What?", max_new_tokens=9
        )
    rows = list(jaxprune.stream(tiny_model, [picture(4)] * 2, "What?", max_new_tokens=9))
    joined = ["".join(column) for column in zip(*rows, strict=True)]
    assert joined == jaxprune.generate(tiny_model, [picture(4)] * 2, "What?", max_new_tokens=9)


def test_stop_strings(small_model, held_out):
    image, _ = held_out[0]
    prompt = "Which is larger, the red circle or the blue square?"
    full = jaxprune.generate(small_model, image, prompt)
    stop = full[2:4]
    answer = jaxprune.generate(small_model, image, prompt, stop=stop, return_details=True)
    assert answer.text == full[: full.index(stop)]
    assert answer.finish_reason == "stop"
    assert "".join(jaxprune.stream(small_model, image, prompt, stop=[stop])) == answer.text


def test_end_of_sequence_and_length(small_model, held_out):
    image, question = held_out[0]
    ended = jaxprune.generate(small_model, image, question.question, return_details=True)
    assert ended.finish_reason == "eos"
    cut = jaxprune.generate(
        small_model, image, "Which is larger, the red circle or the blue square?",
        max_new_tokens=1, return_details=True,
    )  # fmt: skip
    assert cut.finish_reason == "length"
    assert len(cut.token_ids) == 1


def test_answers_end_with_the_context(tiny_model):
    words = "a b " * 105
    answer = jaxprune.generate(
        tiny_model, picture(0), words, max_new_tokens=200, return_details=True
    )
    limit = tiny_model.config.text_config.max_position_embeddings
    assert answer.prompt_tokens + len(answer.token_ids) <= limit


def test_sampling_follows_the_seed_alone(tiny_model, five):
    images, prompts = five
    options = {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "max_new_tokens": 8}
    seeds = [5, 6, 7, 8, 9]
    batch = jaxprune.generate(tiny_model, images, prompts, seed=seeds, **options)
    for i, seed in enumerate(seeds):
        alone = jaxprune.generate(tiny_model, images[i], prompts[i], seed=seed, **options)
        assert alone == batch[i]
    same = jaxprune.generate(
        tiny_model, images[0], [prompts[0]] * 6, seed=list(range(6)), **options
    )
    assert len(set(same)) > 1


def test_narrow_sampling_is_greedy(tiny_model):
    greedy = jaxprune.generate(tiny_model, picture(0), "What?", max_new_tokens=8)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        options = {"temperature": 0.7, **narrow}
        assert (
            jaxprune.generate(tiny_model, picture(0), "What?", max_new_tokens=8, **options)
            == greedy
        )


def test_the_same_shapes_compile_once(tmp_path, compilations):
    # A config of its own: other tests must not have compiled these programs already.
    config = builders.tiny_config(text={"rms_norm_eps": 2e-5})
    builders.write_directory(tmp_path / "model", config)
    model = jaxprune.load(tmp_path / "model")

    def ask(seed, prompt, **options):
        jaxprune.generate(
            model,
            picture(seed, (30 + seed, 41)),
            prompt,
            max_new_tokens=12,
            buckets=jaxprune.Buckets(text=(32,)),
            **options,
        )

    for method in ("none", "prumerge", "prumerge_plus"):
        ask(0, "What is this?", method=method)
    before = len(compilations)
    assert before > 0
    for seed in range(1, 6):
        for method in ("none", "prumerge", "prumerge_plus"):
            ask(seed, "Or " * seed + "that?", method=method)
    assert len(compilations) == before


def test_caches_are_donated(tiny_model):
    run = start(tiny_model, picture(0), "What?", max_new_tokens=6)
    before = run.state.caches[0].k
    run.advance(2)
    assert before.is_deleted()


MISTAKES = [
    ({"prompt": ""}, "The prompt is empty"),
    ({"prompt": "  \n"}, "The prompt is empty"),
    ({"prompt": "<image>"}, "The prompt is empty"),
    ({"prompt": None}, "There is no prompt"),
    ({"prompt": 7}, "prompt is a int"),
    ({"prompt": []}, "list of prompts is empty"),
    ({"prompt": ["a", "b", "c"], "image": [picture(0)] * 2}, "3 prompts came with 2 images"),
    ({"prompt": "<image> <image> a"}, "2 <image> placeholder"),
    ({"prompt": "a <image>", "image": None}, "1 <image> placeholder"),
    ({"prompt": "word " * 400}, "context is 256"),
    ({"prompt": [{"role": "user"}]}, "'role' and 'content'"),
    ({"prompt": [{"role": "robot", "content": "a"}]}, "has role 'robot'"),
    ({"prompt": [{"role": "assistant", "content": "a"}]}, "does not end with a user"),
    ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "has the content"),
    ({"image": []}, "list of images is empty"),
    ({"image": 3}, "image is a int"),
    ({"image": np.zeros((4, 4, 3))}, "array of float64"),
    ({"image": np.zeros((4, 4, 7), np.uint8)}, r"\[4, 4, 7\]"),
    ({"method": "prumrge"}, "Did you mean 'prumerge'"),
    ({"method": "prumerge", "keep": 0}, "keep is 0"),
    ({"method": "visionzip", "keep": 18}, "to keep 18 tokens of .* has 17; that is the most"),
    ({"method": "dart", "layer": 3}, "layer is 3, but the decoder has 3 layers, 0 to 2"),
    ({"method": "v2drop", "budget": 64}, "cut_layers is 3, but the decoder has 3 layers, 0 to 2"),
    ({"method": "hiprune", "keep": 5}, "asks for .*received_attention.* has 3 layers"),
    ({"method": "scope", "keep": 5, "budget": "all"}, "budget is 'all'; expected one of: image, t"),
    (
        {"method": "prumerge", "keep": 17},
        "keep is 17, but an image of this request has 16 patches; that is the most",
    ),
    ({"method": "uniform", "keep": 17}, "has 16 patches"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
    ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": [1, 2]}, "2 seeds came for 1 prompts"),
    ({"stop": ""}, "stop is ''"),
    ({"stop": 5}, "stop is 5"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"temperature": "0.5"}, "temperature is '0.5'"),
    ({"buckets": None}, "buckets is a NoneType"),
    ({"prompt": [1]}, "A prompt is a int"),
    ({"prompt": b"abc"}, "prompt is a bytes"),
    ({"image": "x" * 5000}, "is not a path"),
    ({"image": "https://example.org/a.png"}, "is a URL"),
    ({"max_tokens": 5}, "Did you mean max_new_tokens"),
    ({"prompt": ["a"] * 65, "image": None}, "over the largest bucket 64"),
    ({"chat": False, "prompt": " "}, "The prompt is empty"),
]


@pytest.mark.parametrize("change, message", MISTAKES)
def test_mistakes_are_named(change, message, tiny_model):
    request = {"image": picture(0), "prompt": "What?", **change}
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.generate(tiny_model, **request)


@pytest.mark.parametrize(
    "params, message", [({}, "need config="), (3, "params is a int"), (None, "NoneType")]
)
def test_params_are_checked(params, message):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.generate(params, None, "Hello")


def test_chunk_is_checked(tiny_model):
    with pytest.raises(jaxprune.UserError, match="chunk_tokens is 0"):
        jaxprune.stream(tiny_model, None, "Hello", chunk_tokens=0)


def test_bare_params_are_checked(tiny_model):
    fields = {"config": tiny_model.config, "processor": tiny_model.processor, "max_new_tokens": 1}
    arrays = jax.tree.map(lambda x: x, tiny_model.arrays)
    arrays["language_model"]["norm"]["scale"] = np.zeros(3)
    arrays["language_model"]["extra"] = np.zeros(3)
    with pytest.raises(
        jaxprune.UserError, match=r"norm/scale is \(3,\), expected \(48,\).*extra is unknown"
    ):
        jaxprune.generate(arrays, None, "What?", **fields)
    for odd, message in [
        ({}, "is missing"),
        ({"vision_tower": np.zeros(3)}, "is missing"),
        ({"vision_tower": 3}, "are no nested dicts"),
        ({"vision_tower": [3]}, "are no nested dicts"),
        ({"vision_tower": {3: 3}}, "are no nested dicts"),
        ([], "is a list"),
    ]:
        with pytest.raises(jaxprune.UserError, match=message):
            jaxprune.generate(odd, None, "What?", **fields)


def test_half_characters_are_refused(tiny_model):
    with pytest.raises(jaxprune.UserError, match="no valid text"):
        jaxprune.generate(tiny_model, None, "What \ud800?")
