"""Models with a new head outside training: recipes, what they read, what they answer, how they are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from kasa import KasaConfig, attach, capture_adapter, compute_spectra, save_adapter
from kasa.calibration import StoredCalibration
from kasa.files import file_digest, seal_folder
from kasa.model_spectra import ModelWeights
from kasa.spectra_file import save_spectra
from kasa.targets import select_targets
from pipeline.config.recipe import parse_recipe
from pipeline.config.settings import DataSettings
from pipeline.core.errors import RecipeError
from pipeline.core.files import read_journal
from pipeline.data.prepare import prepare_dataset
from pipeline.data.sources import DataSources, SourceFile
from pipeline.evaluation.worker import EvaluationShard, evaluate_shard, score_labels
from pipeline.metrics.intervals import measure
from pipeline.models.base import BaseModel
from pipeline.models.forward import changed_share, features, probe
from pipeline.models.loading import load_base
from pipeline.models.prompting import Head, Prompting, head_modules
from pipeline.models.shapes import base_outline
from pipeline.serving import served_model
from pipeline.serving.answer import answer
from pipeline.serving.inference import load_model
from pipeline.spectra.audit import AuditJob, audit_truncation
from pipeline.spectra.calibration import CalibrationShard, calibrate_shard
from tests.support.encoders import write_encoder

CLASSES = Head("classification", ("bad", "good", "mixed"))
TEXTS = ["a film of rare warmth.", "dull", "neither good nor bad, and far too long"]


def recipe_of(head: str, **sections: Any) -> Any:
    data = {"train": "rows.jsonl", **sections.pop("data", {})}
    return parse_recipe({"name": "heads", "base": {"head": head}, "data": data, **sections}, "here")


def test_the_evaluation_follows_the_head() -> None:
    classes, values = recipe_of("classification"), recipe_of("regression")
    assert (classes.evaluate.kind, classes.evaluate.gate_metric) == ("classification", "accuracy")
    assert (values.evaluate.kind, values.evaluate.gate_metric) == ("regression", "pearson")
    assert recipe_of("classification", evaluate={"metric": "matthews"}).evaluate.gate_metric == "matthews"
    assert recipe_of("language-model").evaluate.kind == "text"


@pytest.mark.parametrize(
    ("head", "sections", "message"),
    [
        ("classification", {"data": {"prompt_template": "Review: {prompt}"}}, "data.prompt_template has no meaning"),
        ("classification", {"data": {"chat_template": True}}, "data.chat_template has no meaning"),
        ("regression", {"data": {"system_prompt": "Judge."}}, "data.system_prompt has no meaning"),
        ("classification", {"train": {"pack_tokens": 1024}}, "train.pack_tokens has no meaning"),
        ("classification", {"data": {"form": "alpaca"}}, "data.form alpaca does not fit"),
        ("classification", {"evaluate": {"kind": "text"}}, "evaluate.kind text does not fit"),
        ("classification", {"evaluate": {"metric": "pearson"}}, "metric pearson is not measured here"),
        ("regression", {"data": {"labels": ["a", "b"]}}, "regression has none"),
        ("classification", {"data": {"labels": ["a", "a"]}}, "two different names"),
        ("language-model", {"data": {"labels": ["a", "b"]}}, "set base.head"),
        ("language-model", {"evaluate": {"kind": "regression"}}, "set base.head: regression"),
        ("language-model", {"train": {"head_learning_rate": 0.1}}, "needs a new head"),
    ],
)
def test_what_makes_no_sense_with_a_head_is_an_error(head: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(head, **sections)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), "deberta-v2")


def write_adapter(folder: Path, base: Path, head: Head) -> Path:
    """An adapter with a head, moved away from where it began."""
    model = load_base(base, "fp32", head)
    config = KasaConfig(rank=4, truncation="none", dropped_rank=0)
    whole = head_modules(model)
    attach(model, select_targets(base_outline(model, head.kind), "all-linear"), config, trained_modules=whole)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(folder, capture_adapter(model, config, base))
    head.save(folder)
    Prompting().save(folder)
    return folder


def test_an_adapter_with_a_head_answers_with_classes(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, CLASSES)
    loaded = load_model(base, adapter, "fp32", Head.load(adapter))
    together = loaded.predictions(TEXTS)
    for one in together:
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert one.label == max(one.probabilities, key=lambda name: one.probabilities[name])
    # Padding beside longer texts changes nothing.
    for text, one in zip(TEXTS, together, strict=True):
        (alone,) = loaded.predictions([text])
        assert alone.probabilities == pytest.approx(one.probabilities, abs=1e-5)
    assert answer(str(adapter), TEXTS, tmp_path, base, None) == [str(one) for one in together]
    assert loaded.outputs([{"input_ids": [2, 9, 3]}]).dtype == torch.float32


@pytest.mark.parametrize("head", [CLASSES, Head("regression")], ids=lambda head: head.kind)
def test_a_registered_model_answers_with_what_its_head_says(tmp_path: Path, base: Path, head: Head) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, head)
    digest = BaseModel("base", base).digest
    config = {"base_name": "base", "base_folder": str(base), "base_digest": digest, "head": head.kind}
    mlflow.pyfunc.save_model(
        tmp_path / "model",
        python_model=served_model.__file__,
        artifacts={"adapter": str(adapter)},
        model_config=config | {"precision": "fp32", "max_new_tokens": 4},
        pip_requirements=[],
    )
    seal_folder(tmp_path / "model")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    signature = loaded.metadata.signature
    assert (str(signature.inputs), str(signature.outputs)) == ("[string (required)]", "[Map(str -> Any) (required)]")
    expected = load_model(base, adapter, "fp32").predictions(TEXTS)
    if head.kind == "regression":
        assert loaded.predict(TEXTS) == [{"value": one.label} for one in expected]
    else:
        assert loaded.predict(TEXTS) == [{"label": one.label, "probabilities": one.probabilities} for one in expected]


def test_an_untrained_head_is_no_better_than_its_seed(base: Path) -> None:
    said = [load_model(base, None, "fp32", CLASSES, seed=seed).predictions(TEXTS) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_pairs_are_asked_as_they_were_trained(tmp_path: Path, base: Path) -> None:
    head = Head("regression", (), pairs=True)
    loaded = load_model(base, write_adapter(tmp_path / "adapter", base, head), "fp32", head)
    encoded = loaded.tokenizer("one text", "another")
    sample = {name: encoded[name] for name in ("input_ids", "token_type_ids")}
    (said,) = loaded.predictions(["one text ||| another"])
    assert said.label == pytest.approx(float(loaded.outputs([sample])[0, 0]), abs=1e-6)
    assert said.probabilities == {}


def test_scores_hold_labels_predictions_and_outputs(base: Path) -> None:
    loaded = load_model(base, None, "fp32", CLASSES)
    ids = loaded.tokenizer(TEXTS)["input_ids"]
    samples = [{"input_ids": ids[n], "label": float(n), "references": [CLASSES.classes[n]]} for n in range(3)]
    results = score_labels(loaded, samples, [7, 8, 9])
    assert [result["sample"] for result in results] == [7, 8, 9]
    outputs = loaded.outputs(samples)
    for number, result in enumerate(results):
        assert result["label"] == number
        assert result["prediction"] == int(outputs[number].argmax())
        assert result["output"] == CLASSES.classes[result["prediction"]]
        assert result["loss_sum"] == pytest.approx(float(-outputs[number].log_softmax(0)[number]), abs=1e-6)
    assert measure(results, ["loss"])["loss"].estimate == pytest.approx(sum(r["loss_sum"] for r in results) / 3)
    value = load_model(base, None, "fp32", Head("regression"))
    (scored,) = score_labels(value, [{**samples[0], "label": 2.5}], [0])
    assert scored["loss_sum"] == pytest.approx((scored["prediction"] - 2.5) ** 2, rel=1e-5)


def test_features_are_what_the_last_layer_reads(base: Path) -> None:
    model = load_base(base, "fp32", CLASSES).eval()
    samples = [{"input_ids": [2, 9, 12, 3]}, {"input_ids": [2, 20, 21, 3]}]
    seen = features(model, samples)
    assert torch.allclose(
        model.classifier(seen), model(input_ids=torch.tensor([s["input_ids"] for s in samples])).logits
    )
    assert changed_share([seen], [seen]) == 0
    assert changed_share([seen], [0.5 * seen]) == pytest.approx(0.25)
    # A sample's signs are its own, whatever stands beside it.
    together = probe(seen, samples)
    apart = probe(seen[:1], samples[:1]) + probe(seen[1:], samples[1:])
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)


def test_spectra_and_targets_leave_the_head_out(base: Path) -> None:
    model = load_base(base, "fp32", CLASSES)
    targets = select_targets(base_outline(model, "classification"), "all-linear")
    assert not [target.name for target in targets if target.name.startswith(("pooler", "classifier"))]
    assert set(compute_spectra(ModelWeights(model), targets, 2)) == {target.name for target in targets}


def test_what_the_cluster_runs_before_and_after_training(tmp_path: Path, base: Path) -> None:
    """Calibration, audit and evaluation on prepared pairs, each as the function that a worker calls."""
    rows = [
        {"text": f"film {n} {'good' * (n % 2)}", "text_pair": "good", "label": ["no", "yes"][n % 2]} for n in range(60)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = tmp_path / "prepared"
    sources = DataSources((SourceFile(file, file_digest(file)),), (), ())
    prepare_dataset(
        DataSettings(train=[str(file)], heldout_share=0.3, max_tokens=64),
        sources,
        base,
        128,
        prepared,
        print,
        "classification",
    )
    head = Head.load(prepared)
    assert head == Head("classification", ("no", "yes"), pairs=True)

    targets = tuple(select_targets(base_outline(load_base(base, "fp32", head), head.kind), "all-linear"))
    sums = []
    for count in (1, 2):
        outs = [tmp_path / f"sums-{index}-{count}" for index in range(count)]
        for index, out in enumerate(outs):
            journal = tmp_path / "calibration.jsonl"
            calibrate_shard(CalibrationShard(base, prepared, "fp32", targets, 600, True, index, count, out, journal))
        sums.append(StoredCalibration(outs))
    # Shared out over workers, the text says the same; position embeddings are read once a pass, however many there are.
    for target in targets:
        whole, parts = (one.weighting(target.name).inputs_II for one in sums)
        assert torch.allclose(whole / whole.trace(), parts / parts.trace(), atol=1e-4), target.name
    spectra = compute_spectra(ModelWeights(load_base(base, "fp32", head)), targets, 4, weighting=sums[0].weighting)
    save_spectra(tmp_path / "spectra", spectra, dict.fromkeys(spectra, "0"))
    config = KasaConfig(rank=4, truncation="loss", dropped_rank=4)
    job = AuditJob(
        base,
        prepared,
        "fp32",
        tmp_path / "spectra",
        targets,
        config,
        400,
        tmp_path / "audit.json",
        tmp_path / "audit.jsonl",
    )
    facts = audit_truncation(job)
    assert facts["base_loss"] == 0
    assert 0 < facts["worst"][-1]["loss"] <= 2 * facts["truncated_loss"] < 2

    adapter = write_adapter(tmp_path / "adapter", base, head)
    settings = recipe_of("classification").evaluate
    found = []
    for candidate, count in ((None, 1), (adapter, 1), (adapter, 2)):
        journals = [tmp_path / f"{candidate is None}-{index}-of-{count}.jsonl" for index in range(count)]
        for index, journal in enumerate(journals):
            evaluate_shard(EvaluationShard(base, candidate, prepared, "fp32", settings, index, count, journal))
        results = sorted((r for j in journals for r in read_journal(j)), key=lambda r: r["sample"])
        found.append(measure(results, settings.measured))
    assert set(found[0]) == {"accuracy", "f1", "f1_macro", "matthews", "loss"}
    assert found[0] != found[1]
    assert found[1]["loss"].estimate == pytest.approx(found[2]["loss"].estimate, rel=1e-5)
