"""Odd inputs of every kind: nothing may come of them but answers and UserErrors.

    python -m tests.fuzz --inputs 10000 --seed 0

Prints what went wrong, with the seed of the input, and ends with 1 if anything did. An input may
take 20 s, and the process may grow by 1 GB.
"""

import argparse
import collections
import contextlib
import io
import json
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings

import numpy as np
from PIL import Image
from rich.progress import track
from safetensors.numpy import save_file

import jaxprune
from jaxprune.calibrate import Sample, calibrate
from jaxprune.data.samples import read_samples
from jaxprune.engine.cost import estimate
from jaxprune.evaluate import Item
from jaxprune.evaluate.scoring import SCORINGS
from jaxprune.train.data import read_data
from jaxprune.train.rows import Rows
from jaxprune.train.settings import Settings
from tests import builders
from tests.cases import FEW, METHODS, picture

SECONDS, GROWTH = 20, 1 << 30


class Odd:
    """Draws values that nobody meant."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def text(self):
        r = self.random
        return r.choice([
            "", " ", "\n", "What?", "<image>", r"\<image>", "<image><image>", "</s>", "{'type'",
            "\0", "\ud800", "é\u200b\u202e", "{{ 7 }}", "../..", "~nobody/x", "a" * 5000, "NaN",
            "none", "prumerge", "[" * 2000, "".join(chr(r.randrange(32, 0x2FFF)) for _ in range(9)),
        ])  # fmt: skip

    def number(self):
        r = self.random
        return r.choice([
            0, 1, -1, 2, 7, 10**30, -(10**30), 2**31, 2**63, 10**400, 0.0, -0.0, 0.5, 1.5, 1e300,
            float("nan"), float("inf"), True, False, np.int64(3), np.float32(2),
            r.randrange(-9, 99),
        ])  # fmt: skip

    def value(self, depth=0):
        r = self.random
        kind = r.randrange(9 if depth < 3 else 5)
        if kind < 2:
            return self.number()
        if kind < 4:
            return self.text()
        if kind == 4:
            return r.choice([None, b"", b"\xff", object(), print, ..., np.zeros(3), {1, 2}])
        if kind < 7:
            return [self.value(depth + 1) for _ in range(r.randrange(3))]
        return {self.text(): self.value(depth + 1) for _ in range(r.randrange(3))}

    def plain(self):
        """A value that JSON can say."""
        while True:
            found = self.value()
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                return json.loads(json.dumps(found))

    def changed(self, fields):
        """An object with some fields other than they were, gone, or new."""
        found = json.loads(json.dumps(fields))
        for _ in range(self.random.randrange(1, 4)):
            place = found
            while place and self.random.random() < 0.5:
                below = [x for x in place.values() if isinstance(x, dict)]
                if not below:
                    break
                place = self.random.choice(below)
            names = [*place, *["tie_word_embeddings", "rope_scaling", "image_token_id", "colour"]]
            name = self.random.choice(names)
            if self.random.random() < 0.2:
                place.pop(name, None)
            else:
                place[name] = self.plain()
        return found

    def damaged(self, content):
        """Bytes with some of them others, gone or doubled."""
        r, found = self.random, bytearray(content)
        for _ in range(r.randrange(1, 6)):
            if not found:
                break
            place = r.randrange(min(len(found), r.choice([64, 4096, 10**9])))
            match r.randrange(4):
                case 0:
                    found[place] = r.randrange(256)
                case 1:
                    del found[place : place + r.randrange(1, 99)]
                case 2:
                    found[place:place] = bytes(r.randrange(256) for _ in range(9))
                case 3:
                    del found[place:]
        return bytes(found)

    def image(self):
        r = self.random
        match r.randrange(6):
            case 0:
                return picture(r.randrange(5))
            case 1:
                file = io.BytesIO()
                picture(0).save(file, r.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
                return self.damaged(file.getvalue())
            case 2:
                shape = [r.choice([0, 1, 2, 3, 4, 9, 40]) for _ in range(r.randrange(5))]
                dtype = r.choice(["uint8", "float32", "bool", "int64", "complex64", "U3"])
                return np.zeros(shape, dtype)
            case 3:
                levels = np.array([[0.1, r.choice([np.nan, np.inf, -1, 2e9])]], np.float32)
                return Image.fromarray(levels)
            case 4:
                return Image.new(
                    r.choice(["1", "L", "P", "RGBA", "CMYK", "I", "F"]),
                    (r.choice([1, 2, 500]), r.choice([1, 7, 300])),
                )
            case _:
                return self.value()

    def messages(self):
        r = self.random
        return [
            {
                "role": r.choice(["user", "user", "assistant", "system", "tool", 5]),
                "content": r.choice([
                    self.text(),
                    [r.choice([{"type": "text", "text": self.text()}, {"type": "image"},
                               {"type": "image", "image": self.image()}, self.value()])
                     for _ in range(r.randrange(4))],
                    self.value(),
                ]),
            }
            for _ in range(r.randrange(1, 4))
        ]  # fmt: skip


class Fuzzer:
    """Inputs of every kind to a tiny model in a folder of its own."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder = folder
        self.whole = folder / "whole"
        builders.write_directory(self.whole, builders.tiny_config())
        self.model = jaxprune.load(self.whole)
        picture(0).save(folder / "a.png")
        self.recipe = folder / "recipe.json"
        samples = [Sample(picture(i), "What?", "a star") for i in range(3)]
        jaxprune.save_recipe(
            calibrate(self.model, samples, method="fitprune", save=0.3), self.recipe
        )
        self.samples = samples
        self.families = []
        made = {
            "internvl": builders.tiny_internvl_config(),
            "hr": builders.tiny_hr_config(),
            "video": builders.tiny_video_config(),
            "temporal": builders.tiny_video_config(temporal=True),
            "next": builders.tiny_next_config(),
        }
        for name, config in made.items():
            builders.write_directory(folder / name, config)
            self.families.append(folder / name)
        self.families.append(builders.write_published_internvl(folder / "published"))
        self.seeing = jaxprune.load(folder / "temporal")
        self.items = [Item(str(folder / "a.png"), "What?", ["a"], kind=kind) for kind in "ab"]
        self.answers = folder / "answers.jsonl"
        self._evaluated(self.items, out=self.answers)

    def kinds(self):
        return {
            name.removeprefix("of_"): getattr(self, name) for name in dir(self) if name[:3] == "of_"
        }

    def of_arguments(self, odd):
        names = [
            "method", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "chat",
            "eos_token_id", "min_new_tokens", "repetition_penalty", "suppress_tokens", "logprobs",
            "num_return_sequences", "return_logits", "return_details", "neutralise", "config",
            "processor", "keep", "save", "keep_rate", "layer", "positions", "deletions", "buckets",
        ]  # fmt: skip
        own = {name: odd.value() for name in odd.random.sample(names, odd.random.randrange(3))}
        name = odd.random.choice(list(METHODS))
        options = {"method": name, **METHODS[name]} if odd.random.random() < 0.5 else {}
        fields = {"max_new_tokens": 2, "buckets": FEW, **options, **own}
        jaxprune.generate(self.model, picture(0), "What?", **fields)

    def of_prompts(self, odd):
        prompt = odd.messages() if odd.random.random() < 0.6 else odd.value()
        image = odd.random.choice([None, picture(0), [picture(0)], [picture(0), picture(1)]])
        chat, neutral = odd.random.random() < 0.8, odd.random.random() < 0.2
        jaxprune.generate(
            self.model, image, prompt, chat=chat, neutralise=neutral, max_new_tokens=2, buckets=FEW
        )

    def of_images(self, odd):
        jaxprune.generate(self.model, odd.image(), "What?", max_new_tokens=1, buckets=FEW)

    def of_requests(self, odd):
        several = [
            odd.random.choice([
                (odd.image(), odd.text()),
                {"prompt": odd.text(), "image": odd.image(), odd.text(): odd.value()},
                odd.value(),
            ])
            for _ in range(3)
        ]  # fmt: skip
        list(jaxprune.generate_many(
            self.model, several, max_new_tokens=1, buckets=FEW,
            return_errors=odd.random.random() < 0.7,
        ))  # fmt: skip

    def _changed(self, odd, name, whole=None):
        directory = self.folder / "changed"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(whole or self.whole, directory)
        path = directory / name
        if odd.random.random() < 0.3:
            path.write_bytes(odd.damaged(path.read_bytes()))
        else:
            path.write_text(json.dumps(odd.changed(json.loads(path.read_text()))))
        return directory

    def of_configs(self, odd):
        directory = self._changed(odd, "config.json")
        estimate(jaxprune.read_config(directory))
        self._used(directory)

    def of_families(self, odd):
        whole = odd.random.choice(self.families)
        names = [path.name for path in whole.iterdir() if path.suffix == ".json"]
        often = "config.json" if odd.random.random() < 0.7 else odd.random.choice(names)
        directory = self._changed(odd, often, whole)
        estimate(jaxprune.read_config(directory))
        self._used(directory)

    def of_adapters(self, odd):
        directory = self.folder / "changed adapter"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"],
                  "base_model_name_or_path": str(self.whole)}  # fmt: skip
        fields = odd.changed(fields) if odd.random.random() < 0.8 else fields
        (directory / "adapter_config.json").write_text(json.dumps(fields))
        key = "base_model.model.model.language_model.layers.0.self_attn.o_proj.lora_{}.weight"
        other = odd.text().encode(errors="replace").decode()
        sizes = [odd.random.choice([2, 48, 1]), odd.random.choice([2, 2, 3])]
        factors = {key.format("A"): np.ones((2, 48), np.float32),
                   key.format("B"): np.ones((48, sizes[1]), np.float32),
                   other or "x": np.ones(sizes, np.float32)}  # fmt: skip
        if odd.random.random() < 0.5:
            del factors[list(factors)[-1]]
        save_file(factors, directory / "adapter_model.safetensors")
        if odd.random.random() < 0.3:
            path = directory / "adapter_model.safetensors"
            path.write_bytes(odd.damaged(path.read_bytes()))
        jaxprune.load(self.whole, adapter=directory)

    def of_videos(self, odd):
        path = self.folder / "odd video"
        if odd.random.random() < 0.3:
            file = io.BytesIO()
            frames = [picture(i) for i in range(odd.random.randrange(1, 5))]
            frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
            content = file.getvalue()
            path.write_bytes(odd.damaged(content) if odd.random.random() < 0.5 else content)
            video = jaxprune.Video(path)
        else:
            video = jaxprune.Video(odd.random.choice([
                odd.value(), [odd.image() for _ in range(odd.random.randrange(3))]
            ]))  # fmt: skip
        prompts = ["What?", "<video>What?", "<image>?", "<video> <video>", odd.text()]
        prompt = odd.random.choice(prompts)
        model = odd.random.choice([self.seeing, self.seeing, self.model])
        jaxprune.generate(model, video, prompt, max_new_tokens=1, buckets=FEW)

    def of_other_files(self, odd):
        names = ["preprocessor_config.json", "processor_config.json", "generation_config.json",
                 "tokenizer_config.json", "tokenizer.json"]  # fmt: skip
        self._used(self._changed(odd, odd.random.choice(names)))

    def of_weights(self, odd):
        directory = self._changed(odd, "generation_config.json")
        path = directory / "model.safetensors"
        path.write_bytes(odd.damaged(path.read_bytes()))
        if odd.random.random() < 0.3:
            index = {"weight_map": odd.plain()}
            path.rename(directory / "model-00001.safetensors")
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        self._used(directory)

    def _used(self, directory):
        model = jaxprune.load(directory)
        jaxprune.generate(model, picture(0), "What?", max_new_tokens=1, buckets=FEW)

    def of_templates(self, odd):
        directory = self._changed(odd, "generation_config.json")
        (directory / "chat_template.jinja").write_text(odd.random.choice([
            odd.text(), "{{ messages }}", "{{ messages[0].content }}", "{{ 'a' * 10 ** 12 }}",
            "{% for a in messages %}{{ a.content[0].text ~ a }}{% endfor %}", "{{ x.y.z }}",
            "{{ messages | tojson }}<image>", "{{ 'x' | center(10**9) }}",
        ]), errors="replace")  # fmt: skip
        self._used(directory)

    def of_recipes(self, odd):
        path = self.folder / "odd.json"
        whole = json.loads(self.recipe.read_text())
        path.write_text(json.dumps(odd.random.choice([whole, odd.changed(whole)])))
        jaxprune.generate(self.model, picture(0), "What?", method=path, max_new_tokens=1,
                          fractions=True, buckets=FEW)  # fmt: skip

    def of_samples(self, odd):
        path = self.folder / "odd.jsonl"
        whole = {"image": "a.png", "question": "b", "answer": "c"}
        lines = [odd.random.choice([json.dumps(whole), json.dumps(odd.changed(whole)), odd.text()])
                 for _ in range(2)]  # fmt: skip
        path.write_text("\n".join(lines), errors="replace")
        read_samples(path)

    def of_conversations(self, odd):
        path = self.folder / "odd.json"
        said = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
        whole = {"id": 1, "image": "a.png", "conversations": said}
        turns = [odd.changed(odd.random.choice(said)) for _ in range(odd.random.randrange(4))]
        samples = [odd.random.choice([whole, {**whole, "conversations": said + turns},
                                      odd.changed(whole), odd.plain()])
                   for _ in range(odd.random.randrange(1, 4))]  # fmt: skip
        text = json.dumps(samples) if odd.random.random() < 0.5 else "\n".join(
            map(json.dumps, samples))  # fmt: skip
        content = text.encode()
        path.write_bytes(odd.damaged(content) if odd.random.random() < 0.2 else content)
        skip = odd.random.random() < 0.5
        run = Settings(micro_batch=2, batch_size=2)
        rows = Rows(self.model, read_data(path, skip=skip), run, buckets=FEW, skip=skip)
        next(rows.batches(ahead=0))

    def _evaluated(self, data, **fields):
        asked = {"methods": "uniform:keep=4", "max_new_tokens": 1, **fields}
        found = jaxprune.evaluate(self.model, data, show_progress=False, **asked)
        json.dumps(found.as_dict(), allow_nan=False)

    def of_questions(self, odd):
        path, r = self.folder / "odd questions.jsonl", odd.random
        line = {"image": "a.png", "question": "b", "answer": r.choice(["yes", "a", "B"])}
        more = [("choices", ["a", "b"]), ("pair", 1), ("kind", "d"), ("scoring", "exact")]
        line |= dict(r.sample(more, r.randrange(3)))
        other = r.choice([json.dumps(line), json.dumps(odd.changed(line)), odd.text()])
        path.write_text(f"{json.dumps(line)}\n{other}", errors="replace")
        self._evaluated(path, scoring=r.choice([None, None, *SCORINGS]))

    def of_items(self, odd):
        usual = {"image": picture(0), "question": "What?", "answers": ["a"]}
        names = ["image", "question", "answers", "kind", "choices", "scoring", "pair"]
        own = {name: odd.value() for name in odd.random.sample(names, odd.random.randrange(3))}
        image = {"image": odd.image()} if odd.random.random() < 0.3 else {}
        out = odd.random.choice([None, self.folder / "odd out.jsonl"])
        self._evaluated([self.items[0], Item(**{**usual, **image, **own})], out=out)

    def of_evaluations(self, odd):
        names = ["data", "methods", "scoring", "max_new_tokens", "batch_size", "samples", "out"]
        fields = {name: odd.value() for name in odd.random.sample(names, odd.random.randrange(3))}
        name = odd.random.choice(list(METHODS))
        options = {"method": name, **METHODS[name]}
        if odd.random.random() < 0.3:
            options[odd.random.choice(["keep", "layer", "budget", odd.text()])] = odd.value()
        fields = {"methods": options, **fields}
        data = fields.pop("data", None)
        self._evaluated(self.items if data is None else data, **fields)

    def of_answers(self, odd):
        path = self.folder / "odd answers.jsonl"
        content = self.answers.read_bytes()
        if odd.random.random() < 0.5:
            content = odd.damaged(content)
        else:
            lines = content.decode().splitlines()
            place = odd.random.randrange(len(lines))
            lines[place] = json.dumps(odd.changed(json.loads(lines[place])))
            content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(content)
        self._evaluated(self.items, out=path)

    def of_settings(self, odd):
        names = ["method", "save", "keep_rate", "tolerance", "metric", "search", "evaluations",
                 "first_pruned_layer", "queries", "stage2", "batch_size", "seed",
                 "weight"]  # fmt: skip
        own = {name: odd.value() for name in odd.random.sample(names, odd.random.randrange(3))}
        samples = odd.value() if odd.random.random() < 0.3 else self.samples
        base = odd.random.choice([{"method": "fitprune", "save": 0.3}, {"method": "gsearch"}])
        calibrate(self.model, samples, **{**base, "metric": "logprob", **own})

    def of_paths(self, odd):
        use = odd.random.choice([
            jaxprune.load, jaxprune.read_config, jaxprune.load_recipe, read_samples,
            lambda x: jaxprune.checkpoints_convert.convert(self.whole, x, dtype=odd.value()),
            lambda x: jaxprune.export(self.model, x),
            lambda x: jaxprune.export(odd.value(), self.folder / "out"),
        ])  # fmt: skip
        use(odd.value())

    def of_estimates(self, odd):
        own = {name: odd.value() for name in ("text_tokens", "visual_tokens", "image_size", "keep")
               if odd.random.random() < 0.2}  # fmt: skip
        name = odd.random.choice(list(METHODS))
        method = {"method": name, **METHODS[name]} if odd.random.random() < 0.7 else {
            "method": odd.value()}  # fmt: skip
        estimate(self.model.config, **{**method, **own})


def out_of_time(*_):
    raise TimeoutError(f"over {SECONDS} s")


def peak():
    """The most memory that the process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run(inputs, seed, *, show=False):
    """What went wrong: (kind, seed of the input, traceback), and how often each kind answered."""
    wrong, ended, began = [], collections.Counter(), 0
    signal.signal(signal.SIGALRM, out_of_time)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),  # for what is written under an odd name
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        fuzzer = Fuzzer(pathlib.Path(folder) / "files")
        kinds = list(fuzzer.kinds().items())
        for i in track(range(inputs), "Odd inputs", disable=not show):
            if i == 10 * len(kinds):  # the model's programs are made by then
                began = peak()
            name, use = kinds[i % len(kinds)]
            own = f"{seed}.{i}"
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                use(Odd(own))
                ended[name, "answered"] += 1
            except jaxprune.UserError as error:
                ended[name, "refused"] += 1
                if not str(error).strip():
                    wrong.append((name, own, "a UserError that says nothing"))
            except BaseException:
                if isinstance(sys.exc_info()[1], KeyboardInterrupt):
                    raise
                wrong.append((name, own, traceback.format_exc()))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    grown = peak() - began
    if began and grown > GROWTH:
        wrong.append(("memory", str(seed), f"grew by {grown / 2**30:.2f} GiB"))
    return wrong, ended


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    wrong, ended = run(args.inputs, args.seed, show=True)
    for name, own, what in wrong:
        print(f"---- {name}, seed {own}\n{what}")
    for (name, how), number in sorted(ended.items()):
        print(f"{name:12s} {how:9s} {number}")
    print(f"{len(wrong)} of {args.inputs} went wrong; {time.monotonic() - began:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
