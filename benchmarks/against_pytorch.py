"""The same weights and prompts in transformers' PyTorch LLaVA and in jaxprune, turn by turn.

    python benchmarks/against_pytorch.py --json against_pytorch.json

A LLaVA with random weights: a ViT of 12 layers and width 512 over 576 patches, a decoder of 12
layers, width 1024, MLP 2816, vocabulary 32,000; 60 text tokens and an image in every row. In
every round each variant runs once, so that a noisy machine treats them alike; ratios are of
medians. Both run on the same device, PyTorch with its scaled-dot-product attention.

    prefill    pixels to the first token's logits: vision tower, projector, decoder
    decode     a token of every row
    answer     image files' pixels and a prompt to text: preprocessing, prefill, decoding
    ceiling    multiply-adds of the prefill a second, and bytes of weights and caches read a second
               while decoding, as shares of what the machine reaches in a large matrix product
               and in reading a large array; PyTorch's count is that of its own shapes
    selection  what pruning itself costs: PruMerge+ behind the tower, FitPrune in a layer, each
               beside a plain PyTorch rendering of the published procedure
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from PIL import Image
from random_model import IMAGE_TOKEN, write_processor
from rich.console import Console
from rich.progress import track

import jaxprune
from jaxprune.engine import stages
from jaxprune.engine.answer import texts_of
from jaxprune.engine.cost import executed
from jaxprune.engine.engine import Clock, Engine
from jaxprune.engine.sampling import Ask
from jaxprune.engine.session import Session, begin
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.request import Request, Row
from jaxprune.methods import FitPrune, Plan, PruMergePlus
from jaxprune.models.llava import LlavaConfig
from jaxprune.ops.attention import Watch, causal_attention
from jaxprune.ops.cuts import LAST, QUESTION, VISUAL, keep_best
from jaxprune.ops.ranking import nonzero_first
from jaxprune.ops.tiles import one_tile, pack_tilings
from jaxprune.reports.bench import ceilings, decoder_bytes, describe_machine

console = Console(stderr=True)
TEXT, PATCHES, SIDE = 60, 576, 336
LAYERS = 12
PAUSE = 0.3  # PyTorch's threads go on spinning for a while after their work
# FitPrune's published recipe for 60 %, squeezed to 12 layers.
DELETIONS = (72, 103, 95, 48, 37, 20, 25, 55, 42, 26, 5, 1)


def torch_model(device: str) -> Any:
    """A random LLaVA of the benchmark's size."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=8,
            image_size=SIDE,
            patch_size=14,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=4096,
        ),
        image_token_index=IMAGE_TOKEN,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval().to(device)


def jax_model(model: Any) -> jaxprune.Params:
    """The same weights, by way of a directory."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name) / "m"
        model.save_pretrained(directory)
        write_processor(
            LlavaConfig.from_hf(json.loads((directory / "config.json").read_text())), directory
        )
        params = jaxprune.load(directory, dtype="float32")
    assert params.processor is not None
    endless = dataclasses.replace(params.processor, eos_token_ids=())
    return jaxprune.Params(params.arrays, params.config, endless)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Torch:
    """The model under transformers."""

    def __init__(self, model: Any, images: list[Any], ids: np.ndarray, pixels: np.ndarray) -> None:
        self.model, self.images, device = model, images, model.device
        before, after = (torch.tensor(part).expand(len(images), -1) for part in ids)
        image = torch.full((len(images), PATCHES), IMAGE_TOKEN)
        self.ids = torch.cat([before, image, after], dim=1).to(device)
        self.pixels = torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()).to(device)

    def prefill(self) -> Any:
        with torch.inference_mode():
            found = self.model(
                input_ids=self.ids, pixel_values=self.pixels, use_cache=True, logits_to_keep=1
            )
        synchronise()
        return found

    def decode(self, found: Any, tokens: int) -> np.ndarray:
        produced = []
        with torch.inference_mode():
            token = found.logits[:, -1].argmax(-1, keepdim=True)
            for _ in range(tokens):
                produced.append(token)
                found = self.model(
                    input_ids=token, past_key_values=found.past_key_values, use_cache=True
                )
                token = found.logits[:, -1].argmax(-1, keepdim=True)
        synchronise()
        return torch.cat(produced, dim=1).cpu().numpy()

    def answer(self, processor: Any, tokens: int) -> Any:
        arrays = [np.asarray(image) for image in self.images]
        made = processor.image_processor(arrays, input_data_format="channels_last")
        pixels = torch.from_numpy(np.stack(made["pixel_values"])).to(self.model.device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=self.ids,
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
            )
        synchronise()
        return processor.tokenizer.batch_decode(out[:, self.ids.shape[1] :].cpu())


class Jax:
    """The model under jaxprune, with a method."""

    def __init__(self, params: Any, images: list[Any], ids: np.ndarray, plan: Plan) -> None:
        self.params, self.plan = params, plan
        rows = [Row([part.tolist() for part in ids], [i]) for i in range(len(images))]
        self.request = Request(rows, images, False)

    def start(self, tokens: int) -> tuple[Session, float]:
        """A session after its prefill, and the seconds of that, preprocessing apart."""
        buckets = jaxprune.Buckets(text=(TEXT,), new_tokens=(tokens,))
        engine = Engine(self.params, self.plan, buckets)
        asks = [Ask(max_new_tokens=tokens)] * len(self.request.rows)
        session = begin(engine, self.request, asks, Clock(timed=True))
        seconds = session.clock.seconds
        return session, sum(seconds[stage] for stage in ("encode", "select", "prefill"))


def timed(function: Any) -> tuple[Any, float]:
    """What a function gives, and its seconds; other threads may come to rest before."""
    time.sleep(PAUSE)
    began = time.perf_counter()
    found = function()
    return found, time.perf_counter() - began


def measure(
    model: Any, params: jaxprune.Params, batch: int, rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """Times of every variant for a batch size; the unpruned ones must agree on the tokens."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, size=(SIDE, SIDE, 3), dtype=np.uint8))
        for _ in range(batch)
    ]
    ids = rng.integers(5, 500, size=(2, TEXT // 2))
    pixels = pixel_values(params.processor, images, params.config)
    reference = Torch(model, images, ids, pixels)
    variants = {
        "none": Plan(),
        "prumerge_plus, 25 %": PruMergePlus(keep=143).plan(),
        "fitprune 0.6": FitPrune(deletions=DELETIONS, num_tokens=PATCHES).plan(),
    }
    ours = {name: Jax(params, images, ids, plan) for name, plan in variants.items()}
    times: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": [], "answer": []} for name in ("torch", *ours)
    }
    work: dict[str, tuple[int, int]] = {}
    for number in track(range(rounds + 1), f"Batch {batch}", console=console):
        found, prefill = timed(reference.prefill)
        expected, decode = timed(functools.partial(reference.decode, found, tokens))
        _, answer = timed(functools.partial(reference.answer, params.processor, tokens))
        if number:  # the first round compiles and warms up
            for stage, seconds in (("prefill", prefill), ("decode", decode), ("answer", answer)):
                times["torch"][stage].append(seconds)
        for name, one in ours.items():
            (session, prefill), answer = timed(functools.partial(one.start, tokens))
            _, rest = timed(functools.partial(session.advance, tokens))
            decode = session.clock.seconds["decode"]  # the rest of the rest is text
            _, text = timed(functools.partial(texts_of, session))
            if name == "none" and not (session.tokens[:, :tokens] == expected).all():
                raise SystemExit("jaxprune and transformers generate different tokens.")
            work[name] = counted(session, params, batch)
            if number:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode * tokens / (tokens - 1))
                times[name]["answer"].append(answer + rest + text)
    work["torch"] = work["none"]
    return [
        {
            "batch": batch,
            "variant": name,
            "prefill_macs": work[name][0],
            "decode_bytes": work[name][1],
            **{f"{stage}_seconds": float(np.median(x)) for stage, x in one.items()},
            **{
                f"{stage}_spread": float((np.max(x) - np.min(x)) / np.median(x))
                for stage, x in one.items()
            },
            **{
                f"{stage}_speedup": float(np.median(times["torch"][stage]) / np.median(x))
                for stage, x in one.items()
            },
        }
        for name, one in times.items()
    ]


def counted(session: Session, params: jaxprune.Params, batch: int) -> tuple[int, int]:
    """Multiply-adds of a prefill, tower included, and bytes that a decoding step reads."""
    config, prompt = params.config, session.prompt
    slots = prompt.room.slots
    found = executed(config, slots, prompt.schedule, new_slots=prompt.new_slots)
    macs = config.tower.macs(batch) + batch * found["macs"]
    return macs, decoder_bytes(params) + batch * found["cache_bytes"]


# ---- what selection costs


def torch_prumerge_plus(x: Any, s: Any, keys: Any) -> list[Any]:
    """PruMerge+ as published, image by image and token by token: `[m + 1, C]` of each image."""
    N = x.shape[1]
    found = []
    for features, scores, key in zip(x, s, keys, strict=True):
        q1, q3 = torch.quantile(scores, 0.25), torch.quantile(scores, 0.75)
        m = max(1, int((scores > q3 + 1.5 * (q3 - q1)).sum()))
        kept = torch.topk(scores, m).indices.tolist()
        known = set(kept)
        kept += [i for i in range(0, N - 1, max(1, N // m // 3)) if i not in known]
        unit = torch.nn.functional.normalize(key, dim=-1)
        merged = []
        for i in kept:
            similarity = unit @ unit[i]
            similarity[i] = -torch.inf
            near = torch.topk(similarity, min(32, N - 1)).indices
            merged.append(features[i] + (scores[near, None] * features[near]).sum(0))
        gone = torch.ones(N, dtype=torch.bool, device=x.device)
        gone[kept] = False
        merged.append((scores[gone, None] * features[gone]).sum(0))
        found.append(torch.stack(merged))
    return found


def torch_fitprune_layer(q: Any, k: Any, v: Any, left: int) -> Any:
    """A layer's attention with FitPrune's selection, as published: the whole matrix of weights."""
    S, d = q.shape[2:]
    begin = TEXT // 2
    mask = torch.full((S, S), -torch.inf, device=q.device).triu(1)
    weights = torch.softmax(q @ k.transpose(-1, -2) * d**-0.5 + mask, dim=-1)
    out = weights @ v
    most = weights.max(1).values
    visual = slice(begin, begin + PATCHES)
    own = most[:, visual, visual].mean(1)
    cross = most[:, begin + PATCHES :, visual].sum(1)
    kept = begin + torch.topk(own * cross, left).indices.sort(-1).values
    every = torch.cat(
        [
            torch.arange(begin, device=q.device).expand(len(q), -1),
            kept,
            torch.arange(begin + PATCHES, S, device=q.device).expand(len(q), -1),
        ],
        dim=1,
    )
    flat = out.transpose(1, 2).flatten(2)
    return torch.take_along_dim(flat, every[..., None], dim=1)


@functools.partial(jax.jit, static_argnames="left")
def jax_fitprune_layer(q: Any, k: Any, v: Any, kind: Any, left: int) -> Any:
    valid = jnp.ones(kind.shape, bool)
    queries = jnp.stack([kind == VISUAL, kind != VISUAL]).astype(jnp.float32)
    out, received = causal_attention(q, k, v, valid, Watch(queries, "max"))
    assert received is not None
    counts = jnp.full(len(kind), left)
    kept = keep_best(jnp.prod(received, axis=0), kind == VISUAL, counts)
    flat = jnp.swapaxes(out, 1, 2).reshape(*valid.shape, -1)
    return jnp.take_along_axis(flat, nonzero_first(kept, TEXT + left)[..., None], axis=1)


@jax.jit
def jax_layer(q: Any, k: Any, v: Any) -> Any:
    return causal_attention(q, k, v, jnp.ones((len(q), q.shape[2]), bool))[0]


def measure_selection(params: jaxprune.Params, batch: int, rounds: int, device: str) -> list[dict]:
    """Seconds of selection alone; FitPrune's is what it adds to a layer's attention."""
    rng = np.random.default_rng(1)
    config, method = params.config, PruMergePlus()
    pixels = rng.normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32)
    vision = stages.encode(params.arrays, pixels, config=config, signals=method.signals)
    packing = pack_tilings(
        [one_tile(PATCHES)] * batch, images=batch, tiles=batch, image_tiles=1, slots=PATCHES
    )
    inside = {"features": vision.features, **{s.kind: x for s, x in vision.signals.items()}}
    by_name = {n: torch.from_numpy(np.array(x)).to(device) for n, x in inside.items()}

    def ours() -> Any:
        counts = np.asarray(stages.count(vision, packing, None, method))
        capacity = -(-int(counts.max()) // 64) * 64
        found = stages.select(vision, packing, None, method, capacity=capacity, images=batch)
        return jax.block_until_ready(found)

    def theirs() -> Any:
        with torch.inference_mode():
            signals = (by_name[n] for n in ("features", "cls_attention", "keys"))
            found = torch_prumerge_plus(*signals)
        synchronise()
        return found

    S = PATCHES + TEXT
    q, k, v = rng.normal(size=(3, batch, 16, S, 64)).astype(np.float32)
    kind = np.full((batch, S), QUESTION, np.int32)
    kind[:, TEXT // 2 : TEXT // 2 + PATCHES], kind[:, -1] = VISUAL, LAST
    tensors = [torch.from_numpy(x).to(device) for x in (q, k, v)]
    arrays = [jnp.asarray(x) for x in (q, k, v)]
    left = PATCHES - DELETIONS[0]

    def torch_plain() -> Any:
        with torch.inference_mode():
            torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
        synchronise()

    def torch_pruned() -> Any:
        with torch.inference_mode():
            torch_fitprune_layer(*tensors, left)
        synchronise()

    runs = {
        "prumerge_plus, jaxprune": ours,
        "prumerge_plus, PyTorch": theirs,
        "attention of a layer, jaxprune": lambda: jax.block_until_ready(jax_layer(*arrays)),
        "attention of a layer, PyTorch": torch_plain,
        "the same with fitprune, jaxprune": lambda: jax.block_until_ready(
            jax_fitprune_layer(*arrays, kind, left)
        ),
        "the same with fitprune, PyTorch": torch_pruned,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in track(range(rounds + 1), f"Selection, batch {batch}", console=console):
        for name, run in runs.items():
            _, seconds = timed(run)
            if number:
                times[name].append(seconds)
    return [
        {"batch": batch, "what": name, "seconds": float(np.median(x))} for name, x in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=17, help="generated by each, first included")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    args = parser.parse_args()
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    model = torch_model(device)
    params = jax_model(model)
    rows, selection = [], []
    for batch in args.batch:
        rounds = max(3, args.rounds // (1 if batch == 1 else 2))
        rows += measure(model, params, batch, rounds, args.tokens)
        selection += measure_selection(params, batch, rounds, device)

    limit = ceilings()
    print(
        "| batch | variant | prefill, ms | speed-up | of the ceiling | decode, ms a token | "
        "speed-up | of the ceiling | answer, ms | speed-up |"
    )
    print("|---:|---|" + "---:|" * 8)
    for r in rows:
        cells = []
        step = r["decode_seconds"] / args.tokens
        reached = {
            "prefill": r["prefill_macs"] / r["prefill_seconds"] / limit["float32_macs"],
            "decode": r["decode_bytes"] / step / limit["bytes"],
        }
        for stage, parts in (("prefill", 1), ("decode", args.tokens), ("answer", 1)):
            cells.append(f"{1e3 * r[f'{stage}_seconds'] / parts:.1f}")
            cells.append(f"{r[f'{stage}_speedup']:.2f}")
            if stage in reached:
                cells.append(f"{100 * reached[stage]:.0f} %")
        print(f"| {r['batch']} | {r['variant']} | {' | '.join(cells)} |")
    print()
    whole = {r["batch"]: r["prefill_seconds"] for r in rows if r["variant"] == "none"}
    print("| batch | selection | ms | of the unpruned prefill |")
    print("|---:|---|---:|---:|")
    for r in selection:
        share = r["seconds"] / whole[r["batch"]]
        print(f"| {r['batch']} | {r['what']} | {1e3 * r['seconds']:.1f} | {100 * share:.1f} % |")
    machine = {**describe_machine(), **limit, "torch": torch.__version__}
    machine["transformers"] = transformers.__version__
    console.print(machine)
    if args.json:
        fields = {"rows": rows, "selection": selection, "machine": machine}
        args.json.write_text(json.dumps(fields, indent=1) + "\n")


if __name__ == "__main__":
    main()
