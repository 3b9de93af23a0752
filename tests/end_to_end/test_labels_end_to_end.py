"""A small encoder with a new head, through every stage and into the registry, and asked there."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mlflow
import pytest
import torch
import yaml

from kasa import read_adapter
from pipeline.data.prepared import load_prepared
from pipeline.evaluation.results import read_samples
from pipeline.registry.store import open_registry
from pipeline.run.stages.evaluate import RESULTS
from pipeline.serving.answer import answer
from pipeline.serving.inference import load_model
from tests.support.encoders import write_encoder
from tests.support.processes import start_kasa
from tests.support.tiny_run import Bench


@pytest.mark.cluster
def test_a_head_goes_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_encoder(tmp_path / "base", "bert")
    generator = random.Random(0)
    words = {"good": "ggggg", "bad": "bbbbb"}
    rows = [
        {"sentence1": f"{generator.randrange(10**6)} {words[label]}", "sentence2": words[label], "label": label}
        for label in ["good", "bad"] * 100
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "labels",
        "base": {"model": "./base", "head": "classification"},
        "data": {"train": "rows.jsonl", "max_tokens": 64, "heldout_share": 0.3},
        "adapter": {"rank": 4},
        "train": {
            "workers": 2, "deepspeed": "cpu_zero2", "precision": "fp32", "max_steps": 25, "epochs": 9, "batch_size": 16,
            "micro_batch_size": 8, "learning_rate": 5e-3, "head_learning_rate": 2e-2,
        },
        "evaluate": {"metric": "matthews"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    bench = Bench(tmp_path)
    result = bench.run("work")
    metrics = result["metrics"]
    assert set(metrics["adapted"]) == {"accuracy", "f1", "f1_macro", "matthews", "loss"}
    assert metrics["adapted"]["matthews"] > 0.9 > metrics["base"]["matthews"]
    assert result["differences"]["base"]["matthews"]["low"] > 0

    adapter = tmp_path / result["artifacts"]["train"] / "adapter"
    assert read_adapter(adapter).trained_modules == ("classifier",)
    results = read_samples(tmp_path / result["artifacts"]["evaluate"] / RESULTS)
    assert {len(one["logits"]) for one in results} == {2}
    # The saved head, asked the held-out samples and their texts again, answers as it did in the evaluation.
    predictor = load_model(tmp_path / "base", adapter, "fp32")
    heldout = load_prepared(tmp_path / result["artifacts"]["prepare"]).heldout
    logits = predictor.outputs([heldout[row] for row in range(len(heldout))])
    torch.testing.assert_close(logits, torch.tensor([one["logits"] for one in results]), rtol=0, atol=1e-3)
    again = predictor.predictions([sample["prompt"] for sample in heldout])
    assert [str(one) for one in again] == [one["output"] for one in results]
    monkeypatch.chdir(tmp_path)
    texts = ["123 ggggg ||| ggggg", "99 bbbbb ||| bbbbb"]
    uri = "models:/labels@champion"
    open_registry(Path("work"))  # MLflow remembers the registry for the whole process
    said = mlflow.pyfunc.load_model(uri).predict(texts)
    assert [one["label"] for one in said] == ["good", "bad"]
    assert said[0]["probabilities"]["good"] > 0.9
    assert answer(uri, texts, Path("work"), None, None) == ["good", "bad"]

    command = ["compare", "recipe.yaml", "--methods", "kasa,lora", "--seeds", "1", "--json", "workspace=work"]
    compared = bench.finish(start_kasa(command, tmp_path))
    # The base, and what `kasa run` has trained.
    assert (compared["trials"], compared["reused"]) == (3, 0)
    rows = compared["methods"]
    assert rows["kasa"]["metrics"]["matthews"]["estimate"] == pytest.approx(metrics["adapted"]["matthews"])
    assert all(rows[name]["metrics"]["matthews"]["estimate"] > 0.9 for name in ("kasa", "lora"))
    assert len(list((tmp_path / "work" / "artifacts" / "train").glob("*/manifest.json"))) == 2
