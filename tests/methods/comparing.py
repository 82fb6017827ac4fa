"""A request through the library and through the plain decoder: both have to agree."""

import chex
import numpy as np

from jaxprune.ops.cuts import LAST, QUESTION, VISUAL, Depth
from tests.builders import start
from tests.cases import picture
from tests.methods import plain_decoder as plain

N, L = 64, 4  # visual tokens and layers of `conftest.model`
DEPTH, SEVEN_B = Depth(L), Depth(32)


def compare(model, method, delete, new=20, prompt="Where is it, please?", **options):
    run = start(model, picture(4), prompt, method=method, max_new_tokens=new, **options)
    embedded = run.prompt.layout.embedded
    length = int(embedded.lengths[0])
    kind = embedded.kind[0, :length]
    tokens = run.engine.embed(run.prompt, run.seen)
    decoder = plain.PlainDecoder(model["language_model"], model.config.text_config)
    ids, logits, survivors, lengths = decoder.generate(
        np.asarray(tokens.x[0, :length]),
        np.arange(length),
        kind == VISUAL,
        (kind == QUESTION) | (kind == LAST),
        delete,
        new,
        renumber=run.prompt.schedule.renumber,
    )
    chex.assert_trees_all_close(np.asarray(run.first_logits[0]), logits[0], atol=1e-4)
    for layer, (positions, valid) in zip(run.prompt.schedule.layers, run.survivors, strict=True):
        found = np.asarray(positions[0])[np.asarray(valid[0])]
        assert found.tolist() == survivors[layer].tolist()
    valid = [int(np.asarray(cache.valid[0]).sum()) for cache in run.state.caches]
    assert valid == lengths
    run.advance(new)
    until = run.lengths[0] + run.done[0]  # the plain decoder does not stop at the end token
    assert run.tokens[0, :until].tolist() == ids[:until]
    return run
