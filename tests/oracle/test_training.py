"""Losses, gradients and updates against `peft` and PyTorch's AdamW, float32."""

import warnings

import jax
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

import jaxprune
from jaxprune.models.registry import table_of
from jaxprune.ops.cuts import AFTER_ATTENTION
from jaxprune.train.lora import adapted
from jaxprune.train.objective import objective
from jaxprune.train.optimiser import make_optimiser, peaks, share_of_peak
from jaxprune.train.step import Trainer
from jaxprune.train.trained import acting, init_trained, resting
from tests.cases import mostly_slow
from tests.oracle import builders
from tests.train.builders import batch_of, random_adapters, settings_of

RANK, ALPHA = 4, 6.0
MATRICES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def torch_model():
    return builders.torch_llava(text={"num_hidden_layers": 2, "num_key_value_heads": 2})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "model"
    return jaxprune.load(builders.save(torch_model(), directory), dtype="float32")


@pytest.fixture(scope="module")
def trained(model):
    own = init_trained(model.arrays, settings_of(), jax.random.key(0))
    return {**own, "lora": random_adapters(own["lora"])}


# ---- the same in PyTorch


def with_adapters(adapters):
    """A model wrapped by PEFT that has these adapters; they and its projector want gradients."""
    targets = rf".*language_model.*\.({MATRICES})"
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    with warnings.catch_warnings():  # of what transformers is about to rename
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(torch_model(), config)
    with torch.no_grad():
        for path, own in factors(model).items():
            own["a"].copy_(torch.from_numpy(np.array(adapters[path]["a"]).T))
            own["b"].copy_(torch.from_numpy(np.array(adapters[path]["b"]).T))
    for parameter in projector(model).values():
        parameter.requires_grad = True
    return model


def factors(model):
    """The factors of a wrapped model's adapters by our paths, in PyTorch's layout."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            layer, block, last = name.split(".")[-3:]
            pair = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[f"layers_{layer}/{block}/{last}"] = dict(zip("ab", pair, strict=True))
    return found


def projector(model):
    part = model.get_base_model().model.multi_modal_projector
    return dict(part.named_parameters())


def as_ours(model, take):
    """What `take` gives of every trained parameter of a wrapped model, in our tree."""
    both = {
        path: {name: take(x).numpy().T for name, x in own.items()}
        for path, own in factors(model).items()
    }
    linear = {"linear_1": {}, "linear_2": {}}
    for name, parameter in projector(model).items():
        layer, kind = name.split(".")
        x = take(parameter).numpy()
        linear[layer]["kernel" if kind == "weight" else kind] = x.T
    return {"lora": both, "multi_modal_projector": linear}


def torch_inputs(batch):
    """A batch of unpruned images as `transformers` takes it."""
    ids = np.where(
        np.asarray(batch.layout.visual_index) >= 0, 4, np.asarray(batch.layout.token_ids)
    )
    labels = np.full(ids.shape, -100)
    labels[:, 1:] = np.where(batch.labels >= 0, batch.labels, -100)[:, :-1]
    used = np.arange(ids.shape[1]) < np.asarray(batch.layout.lengths)[:, None]
    return {
        "input_ids": torch.from_numpy(np.where(used, ids, 3)).long(),
        "attention_mask": torch.from_numpy(used).long(),
        "pixel_values": torch.from_numpy(pixels_of(batch)),
        "labels": torch.from_numpy(labels).long(),
    }


def pixels_of(batch):
    return np.ascontiguousarray(np.asarray(batch.pixel_values).transpose(0, 3, 1, 2))


def prumerge(tower, pixels, kept):
    """PruMerge's tokens of one image (arXiv 2403.15388) where the kept patches are known."""
    with torch.no_grad():
        states = tower(pixels[None], output_hidden_states=True).hidden_states
        last = tower.encoder.layers[-1]
        y = last.layer_norm1(states[-2])[0]
        keys = last.self_attn.k_proj(y)
        scores = torch.softmax(last.self_attn.q_proj(y[:1]) @ keys.T / keys.shape[-1] ** 0.5, -1)
        x, keys, s = states[-2][0, 1:], keys[1:], scores[0, 1:]
        tokens = []
        for i in kept:
            near = torch.nn.functional.cosine_similarity(keys[i][None], keys)
            near[i] = -torch.inf
            neighbours = near.topk(min(32, len(x) - 1)).indices
            tokens.append(x[i] + sum(s[j] * x[j] for j in neighbours))
        tokens.append(sum(s[j] * x[j] for j in range(len(x)) if j not in kept))
    return torch.stack(tokens)


def features(tower, pixels, _kept):
    with torch.no_grad():
        return tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]


def plain_loss(wrapped, batch, found):
    """The mean loss of a batch, row by row, shortened where tokens are known to be dropped."""
    model = wrapped.get_base_model()
    decoder, tower = model.model.language_model, model.model.vision_tower
    see = features if batch.method is None else prumerge
    schedule, losses = batch.schedule, []
    for row, length in enumerate(np.asarray(batch.layout.lengths)):
        kept = [i for i in np.asarray(found.kept)[row].tolist() if i >= 0]
        visual = see(tower, torch.from_numpy(pixels_of(batch)[row]), kept)
        x = decoder.embed_tokens(torch.from_numpy(np.array(batch.layout.token_ids[row, :length])))
        place = torch.from_numpy(np.asarray(batch.layout.visual_index)[row, :length] >= 0)
        x = x.index_put((place,), model.model.multi_modal_projector(visual))
        slots = torch.arange(length)
        for l, layer in enumerate(decoder.layers):
            rotary = decoder.rotary_emb(x[None], slots[None])
            normed = layer.input_layernorm(x[None])
            x = x + layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0][0]
            stays = torch.ones(len(slots), dtype=torch.bool)
            if l in schedule.layers:
                left, valid = (
                    np.asarray(y)[row] for y in found.survivors[schedule.layers.index(l)]
                )
                stays = torch.isin(slots, torch.from_numpy(left[valid]).long())
            if schedule.cut == AFTER_ATTENTION:
                x, slots, stays = x[stays], slots[stays], stays[stays]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            x, slots = x[stays], slots[stays]
        assert len(slots) < length or not schedule.layers
        labels = torch.from_numpy(np.asarray(batch.labels)[row])[slots].long()
        logits = model.lm_head(decoder.norm(x))
        each = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        losses.append(each[labels >= 0])
    return torch.cat(losses).mean()


# ---- comparisons


def assert_close(found, expected, tolerance):
    """Every array, measured by the length of the difference."""
    flat, other = jax.tree.leaves_with_path(found), dict(jax.tree.leaves_with_path(expected))
    assert len(flat) == len(other)
    for path, x in flat:
        off = np.linalg.norm(np.asarray(x) - other[path])
        assert off <= tolerance * np.linalg.norm(other[path]), (path, off)


def loss_and_gradients(trained, model, batch, settings):
    @jax.jit
    def run(trained, rest, batch):
        return jax.value_and_grad(objective, has_aux=True)(trained, rest, batch, settings)

    (loss, _), gradients = run(trained, resting(model, settings), batch)
    return float(loss), gradients


SETTINGS = settings_of(rank=RANK, alpha=ALPHA)


def test_gradients_are_pefts(model, trained):
    batch = batch_of(model)
    loss, gradients = loss_and_gradients(trained, model, batch, SETTINGS)
    wrapped = with_adapters(trained["lora"])
    expected = wrapped(**torch_inputs(batch)).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients, as_ours(wrapped, lambda x: x.grad), 1e-4)


@pytest.mark.parametrize(
    "options, gather",
    mostly_slow(
        [
            ({"method": "prumerge", "keep": 5}, False),
            ({"method": "fastv", "layer": 1, "keep_rate": 0.25}, False),
            ({"method": "fastv", "layer": 1, "keep_rate": 0.25}, True),
            ({"method": "fitprune", "deletions": (5, 6), "num_tokens": 16}, True),
            ({"method": ("prumerge", "fastv"), "keep": 9, "keep_rate": 0.5, "layer": 1}, True),
        ],
        [],
    ),
)
def test_gradients_with_pruning(model, trained, options, gather):
    """Through merged tokens and past dropped ones: those that our forward pass keeps are given."""
    batch = batch_of(model, gather=gather, **options)
    full = {**model.arrays, "multi_modal_projector": trained["multi_modal_projector"]}
    with adapted(trained["lora"], acting(SETTINGS)):
        found = jax.jit(lambda *x: jaxprune.forward(*x))(full, batch)
    loss, gradients = loss_and_gradients(trained, model, batch, SETTINGS)
    wrapped = with_adapters(trained["lora"])
    expected = plain_loss(wrapped, batch, found)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients, as_ours(wrapped, lambda x: x.grad), 1e-4)


@pytest.mark.slow
def test_gradients_of_the_whole_decoder(model):
    settings = settings_of(train="all")
    batch, reference = batch_of(model), torch_model()
    trained = init_trained(model.arrays, settings, jax.random.key(0))
    _, gradients = loss_and_gradients(trained, model, batch, settings)
    reference(**torch_inputs(batch)).loss.backward()
    by_name = {name: x.grad for name, x in reference.named_parameters()}
    table, expected = table_of(model.config), {}
    for name, x in by_name.items():
        key = table.canonical_key(name)
        rule = table.rule_of_key(key)
        if x is not None and rule.paths[0].split("/")[0] in gradients:
            node = expected
            *parents, last = rule.paths[0].split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            (node[last],) = rule.load(x.numpy(), [x.numpy().shape], model.config)
    assert_close(gradients, expected, 1e-4)


def groups(matrices, projector, settings):
    """The groups of parameters that Hugging Face's trainer makes: biases do not decay."""
    weights, biases = ([x for x in projector if (x.ndim > 1) == matrix] for matrix in (True, False))
    decay, slow = settings.weight_decay, settings.projector_rate
    return [
        {"params": matrices, "lr": settings.learning_rate, "weight_decay": decay},
        {"params": weights, "lr": slow, "weight_decay": decay},
        {"params": biases, "lr": slow, "weight_decay": 0.0},
    ]


def run_of(parameters, settings, updates):
    """AdamW over some groups, and its schedule."""
    optimiser = torch.optim.AdamW(parameters)
    rising = int(np.ceil(settings.warmup * updates))
    return optimiser, transformers.get_cosine_schedule_with_warmup(optimiser, rising, updates)


def test_the_optimiser_is_adamw_with_a_cosine(rng):
    """On made-up gradients, of which some are clipped."""
    settings, updates = settings_of(warmup=0.12, weight_decay=0.1, clip=2.0), 12
    shapes = {"lora": {"a": (4, 3)}, "multi_modal_projector": {"kernel": (3, 5), "bias": (5,)}}

    def drawn(size=1.0):
        draw = lambda shape: size * rng.normal(size=shape).astype(np.float32)  # noqa: E731
        return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))

    ours = drawn()
    theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.from_numpy(x.copy())), ours)
    optimiser = make_optimiser(settings, updates)
    state, update = optimiser.init(ours), jax.jit(optimiser.update)
    projector = [*theirs["multi_modal_projector"].values()]
    parameters = groups([theirs["lora"]["a"]], projector, settings)
    reference, schedule = run_of(parameters, settings, updates)
    for step in range(updates):
        gradients = drawn(0.2 if step % 2 else 2.0)
        for x, gradient in zip(jax.tree.leaves(theirs), jax.tree.leaves(gradients), strict=True):
            x.grad = torch.from_numpy(gradient.copy())
        torch.nn.utils.clip_grad_norm_(jax.tree.leaves(theirs), settings.clip)
        rate = peaks(settings)["lora"] * share_of_peak(settings, updates, step)
        assert float(rate) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-5, abs=1e-9)
        reference.step()
        schedule.step()
        changes, state = update(gradients, state, ours)
        ours = optax.apply_updates(ours, changes)
        assert_close(ours, jax.tree.map(lambda x: x.detach().numpy(), theirs), 1e-5)


@pytest.mark.slow
def test_twenty_updates_are_those_of_peft(model):
    """With warm-up, cosine, clipping, decay and micro-batches of unlike numbers of tokens."""
    settings = settings_of(rank=RANK, alpha=ALPHA, warmup=0.12, weight_decay=0.1, clip=2.0)
    trainer = Trainer(model, settings, 20)
    state = trainer.begin(model)
    wrapped = with_adapters(state.trained["lora"])
    matrices = [x for own in factors(wrapped).values() for x in own.values()]
    optimiser, schedule = run_of(
        groups(matrices, projector(wrapped).values(), settings), settings, 20
    )
    unlike = ("no", "it is to the left of the other one", "left", "I see")
    micro = [batch_of(model, rows, answers=unlike) for rows in ((0, 1), (2, 3))]
    inputs = [torch_inputs(batch) for batch in micro]
    norms = []
    for _ in range(20):
        losses = [wrapped(**one).loss / len(inputs) for one in inputs]
        sum(losses).backward()
        wanted = [x for x in wrapped.parameters() if x.requires_grad]
        norms.append(torch.nn.utils.clip_grad_norm_(wanted, settings.clip).item())
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        state, told = trainer.update(state, micro)
        assert float(told.loss) == pytest.approx(sum(losses).item(), rel=1e-3)
        assert float(told.norm) == pytest.approx(norms[-1], rel=1e-2)
    assert min(norms) < settings.clip < max(norms)
    assert_close(state.trained, as_ours(wrapped, lambda x: x.detach()), 1e-3)
