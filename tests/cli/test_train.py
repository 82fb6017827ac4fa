"""`jaxprune train`: a run, and what is refused before a model is loaded."""

import json
import sys

from tests.cases import picture


def test_a_run(run, tiny_directory, tmp_path):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    data = tmp_path / "data.json"
    data.write_text(
        json.dumps([{"id": i, "image": f"{i}.png", "conversations": said} for i in (0, 1)])
    )
    command = [
        "train", "--data", data, "--out", tmp_path / "run", "--model", tiny_directory, "--rank", 2,
        "--batch-size", 2, "--micro-batch", 2, "--steps", 2, "--method", "fastv:layer=1",
    ]  # fmt: skip
    done = run(*command)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{tmp_path / 'run' / 'adapter'} (after 2 of 2 updates)\n"
    again = run(*command, "--json")
    assert again.code == 0 and "2 of 2 updates are done already" in again.err
    found = {"directory": str(tmp_path / "run" / "adapter"), "updates": 2, "accuracy": None}
    assert json.loads(again.out) == found


def test_recipes_are_listed(run):
    done = run("train", "--recipes", "--json")
    assert done.code == 0
    assert json.loads(done.out)["prumerge_plus"]["settings"]["method"] == "prumerge_plus:keep=144"


def test_mistakes(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    data = ["--data", "d.json", "--out", "run"]
    assert "--data and --out are needed" in refused("train")
    assert "d.json does not exist" in refused("train", *data)
    assert "rank is 0; expected" in refused("train", *data, "--rank", 0)
    assert "no training recipe 'x'" in refused("train", *data, "--recipe", "x")
    assert "Did you mean 'prumerge'" in refused("train", *data, "--method", "prumrge:keep=3")
    assert "tensorboardX, which is not installed" in refused("train", *data, "--tensorboard", "t")
    (tmp_path / "d.json").write_text("[]")
    assert "no samples" in refused("train", *data)
    (tmp_path / "d.json").write_text('[{"image": "a.png", "conversations": []}, 3]')
    said = refused("train", *data)
    assert "2 samples of d.json are wrong" in said
