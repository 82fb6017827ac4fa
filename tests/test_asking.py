"""What a row may ask for beside its prompt: stops, ends, penalties, log-probabilities, copies."""

import multiprocessing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.inputs.processor import load_processor
from tests.builders import edit, tiny_config, write_directory
from tests.cases import FEW, picture


def ask(model, prompt="What is it?", **options):
    options = {"max_new_tokens": 12, "buckets": FEW, "return_details": True, **options}
    return jaxprune.generate(model, picture(2), prompt, **options)


@pytest.fixture(scope="module")
def plain(tiny_model):
    """Its answer of 12 tokens, none of which ends it."""
    answer = ask(tiny_model, eos_token_id=511)
    assert len(answer.token_ids) == 12
    return answer


def piece(model, answer, place):
    """The text of one token of an answer, as it stands there."""
    decode = model.processor.tokenizer.decode
    before, after = (decode(answer.token_ids[:n]) for n in (place, place + 1))
    return after[len(before) :]


@pytest.mark.parametrize("place", [1, 4, 9])
def test_text_ids_and_reason_of_a_stop_agree(tiny_model, plain, place):
    stop = piece(tiny_model, plain, place)
    found = ask(tiny_model, stop=stop, eos_token_id=511)
    streamed = "".join(
        jaxprune.stream(
            tiny_model, picture(2), "What is it?", max_new_tokens=12, buckets=FEW, stop=stop,
            eos_token_id=511, chunk_tokens=5,
        )
    )  # fmt: skip
    whole = tiny_model.processor.tokenizer.decode(plain.token_ids, skip_special_tokens=True)
    assert found.finish_reason == "stop"
    assert found.text == streamed == whole[: whole.index(stop)].strip()
    said = tiny_model.processor.tokenizer.decode(found.token_ids)
    shorter = tiny_model.processor.tokenizer.decode(found.token_ids[:-1])
    assert stop in said and stop not in shorter


def test_a_special_token_stops(tiny_model, plain):
    """One that has no text, at the place where the model says it."""
    tokenizer = tiny_model.processor.tokenizer
    biased = jax.tree.map(lambda x: x, tiny_model)
    head = biased.arrays["language_model"]["lm_head"]["kernel"]
    pad = tokenizer.pad_token_id
    biased.arrays["language_model"]["lm_head"]["kernel"] = head.at[:, pad].set(50 * head[:, pad])
    answer = ask(biased, eos_token_id=511, max_new_tokens=30)
    if pad not in answer.token_ids:
        pytest.skip("the model does not say it")
    found = ask(biased, stop=tokenizer.pad_token, eos_token_id=511, max_new_tokens=30)
    place = answer.token_ids.index(pad)
    assert found.finish_reason == "stop" and found.token_ids == answer.token_ids[: place + 1]


def test_the_end_of_sequence_can_be_chosen(tiny_model, plain):
    third = plain.token_ids[3]
    first = plain.token_ids.index(third)
    for given in (third, [third, 500]):
        found = ask(tiny_model, eos_token_id=given)
        assert found.token_ids == plain.token_ids[:first] and found.finish_reason == "eos"
    later = ask(tiny_model, eos_token_id=third, min_new_tokens=8)
    assert len(later.token_ids) >= 8 and third not in later.token_ids[:8]
    with pytest.raises(jaxprune.UserError, match="eos_token_id is -3; expected the id"):
        ask(tiny_model, eos_token_id=-3)


def test_a_penalty_makes_repeated_tokens_rarer(tiny_model):
    repeated = [len(set(ask(tiny_model, repetition_penalty=p, eos_token_id=511,
                            max_new_tokens=16).token_ids)) for p in (0.5, 1.0, 5.0)]  # fmt: skip
    assert repeated[0] < repeated[2] and repeated[1] <= repeated[2]


def test_suppressed_tokens_are_not_said(tiny_model, plain):
    banned = plain.token_ids[:3]
    found = ask(tiny_model, suppress_tokens=banned, eos_token_id=511)
    assert not set(banned) & set(found.token_ids)


def test_log_probabilities_are_those_of_the_logits(tiny_model, plain):
    found = ask(tiny_model, logprobs=3, return_logits=True, eos_token_id=511)
    assert found.token_ids == plain.token_ids
    assert found.logits.shape == (12, 512)
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(found.logits)))
    for i, own in enumerate(found.logprobs):
        assert own.token_id == found.token_ids[i]
        np.testing.assert_allclose(own.logprob, expected[i, own.token_id], atol=1e-5)
        best = np.argsort(-expected[i], kind="stable")[:3].tolist()
        assert [token for token, _ in own.top] == best
        np.testing.assert_allclose([x for _, x in own.top], expected[i, best], atol=1e-5)
    assert "logits" not in found.as_dict() and len(found.as_dict()["logprobs"]) == 12
    with pytest.raises(jaxprune.UserError, match="pass return_details=True"):
        ask(tiny_model, logprobs=2, return_details=False)


def test_several_answers_to_a_prompt(tiny_model):
    options = {"temperature": 2.0, "seed": 5, "num_return_sequences": 3, "return_details": False}
    one = ask(tiny_model, **options)
    assert len(one) == 3 and len(set(one)) > 1
    single = {**options, "num_return_sequences": 1}
    assert one[0] == ask(tiny_model, **single)
    two = jaxprune.generate(
        tiny_model,
        [picture(2)] * 2,
        ["What is it?", "a"],
        max_new_tokens=12,
        buckets=FEW,
        **options,
    )
    assert [len(group) for group in two] == [3, 3] and two[0] == one
    with pytest.raises(jaxprune.UserError, match="at temperature 0 all answers are the same"):
        ask(tiny_model, num_return_sequences=2)


@pytest.mark.parametrize("value", [4, None])
def test_arguments_that_there_are_not(tiny_model, value):
    with pytest.raises(jaxprune.UserError, match="There is no argument num_beams, and no method"):
        ask(tiny_model, num_beams=value)
    with pytest.raises(jaxprune.UserError, match=r"There is no option num_beams; fastv has"):
        ask(tiny_model, method="fastv", layer=1, num_beams=value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 10**30}, "max_new_tokens is a number of too many digits"),
        ({"temperature": 10**400}, "temperature is 10"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"suppress_tokens": [512]}, "suppress_tokens is .512.; the vocabulary has 0 to 511"),
        ({"suppress_tokens": "ab"}, "suppress_tokens is 'ab'; expected ids"),
        ({"logprobs": 21}, "logprobs is 21; expected 0 to 20"),
        ({"return_logits": 1}, "return_logits is 1; expected True or False"),
        ({"chat": np.ones(2)}, "chat is .*; expected True or False"),
        ({"return_details": "yes"}, "return_details is 'yes'"),
        ({"config": 5}, "config is a int; expected one of"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
    ],
)
def test_mistakes(tiny_model, options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        ask(tiny_model, **options)


# ---- what may be wrong with the model


def test_a_token_past_the_embedding(tmp_path):
    directory = tmp_path / "m"
    write_directory(directory, tiny_config(text={"vocab_size": 400}))
    model = jaxprune.load(directory)
    read = model.processor.tokenizer
    late = next(
        text for text in map(read.decode, range(400, 419)) if max(read(text)["input_ids"]) > 399
    )
    with pytest.raises(jaxprune.UserError, match=r"of id 4\d\d, but the model's embedding has 400"):
        ask(model, f"What is {late}?")


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_logits_that_are_no_numbers(tiny_model, value):
    broken = jax.tree.map(lambda x: x, tiny_model)
    scale = broken.arrays["language_model"]["norm"]["scale"]
    broken.arrays["language_model"]["norm"]["scale"] = scale.at[0].set(value)
    for use in (ask, lambda m: list(jaxprune.stream(m, picture(2), "What?", buckets=FEW))):
        with pytest.raises(jaxprune.UserError, match="logits for prompt 1 are NaN or infinite"):
            use(broken)


@pytest.mark.parametrize("ids", [[True], "2", [2**40], 1.5])
def test_an_end_of_sequence_that_is_no_id(tiny_directory, tmp_path, ids):
    directory = tmp_path / "m"
    write_directory(directory, tiny_config())
    edit(directory, "generation_config.json", eos_token_id=ids)
    with pytest.raises(jaxprune.UserError, match=r"eos_token_id=.*; expected ids of tokens"):
        jaxprune.load(directory)


def test_settings_that_do_not_act_are_named(tmp_path):
    directory = tmp_path / "m"
    write_directory(directory, tiny_config())
    edit(directory, "generation_config.json", do_sample=True, num_beams=4, temperature=0.2)
    with pytest.warns(UserWarning, match=r"sets do_sample, num_beams, which does not act here"):
        load_processor(directory, tiny_config())
    edit(directory, "generation_config.json", do_sample=False, num_beams=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_processor(directory, tiny_config())


def child(model, queue):
    try:
        jaxprune.generate(model, None, "Hi", max_new_tokens=1)
        queue.put("answered")
    except jaxprune.UserError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_is_told(tiny_model):
    ask(tiny_model)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(tiny_model, queue))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert "cannot run in a process that was forked" in queue.get()
