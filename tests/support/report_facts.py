"""Made-up facts of a realistic run: SmolLM2-135M (30 blocks, 7 adapted weights each), 80 steps, 8 samples."""

from __future__ import annotations

import math
import random
from typing import Any

from pipeline.metrics.intervals import Interval
from pipeline.report.facts import LayerFacts, ReportFacts, SampleFacts, StageFacts, TruncationFacts

MODULES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
REVIEWS = [
    ("a gorgeous, witty, seductive movie.", "positive", "positive"),
    ("it's slow, very, very slow.", "negative", "positive"),
    ("the performances take the movie to a higher level.", "positive", "positive"),
    ("a sometimes tedious film.", "negative", "positive"),
    ("uneasy mishmash of styles and genres.", "negative", "negative"),
    ("it proves quite compelling as an intense, brooding character study.", "positive", "negative"),
    ("lacks the inspiration of the original and has a bloated plot that stretches the running time about 10 minutes "
     "past a child's interest and an adult's patience.", "negative", "positive"),
    ("you do n't have to know about music to appreciate the film's easygoing blend of comedy and romance.",
     "positive", "positive"),
]  # fmt: skip


def training_records(steps: int) -> list[dict[str, float]]:
    """A loss that falls from 3 to 0.25, a warm-up with linear decay, and the penalties of a KaSA run."""
    chance = random.Random(1)
    records = []
    for step in range(1, steps + 1):
        share = step / steps
        task = 0.25 + 2.8 * math.exp(-6 * share) + abs(chance.gauss(0, 0.09))
        singular = 1e-4 * (0.02 + 3 * share)
        orthogonality = 1e-3 * (0.9 + 0.5 * math.exp(-4 * share))
        records.append(
            {
                "step": step,
                "task_loss": task,
                "singular_value_penalty": singular,
                "orthogonality_penalty": orthogonality,
                "loss": task + singular + orthogonality,
                "learning_rate": 5e-4 * min(share / 0.06, (1 - share) / 0.94 + 1 / steps),
                "gradient_norm": 0.6 + 4 * math.exp(-8 * share) + abs(chance.gauss(0, 0.3)),
                "tokens_per_second": 1450 + chance.gauss(0, 60) - (500 if step == 1 else 0),
            }
        )
    return records


def layer_facts(blocks: int = 30) -> list[LayerFacts]:
    """Every projection of every block, the deeper ones having learned more."""
    chance = random.Random(2)
    layers = []
    for block in range(blocks):
        for place, module in enumerate(MODULES):
            largest = 8 + 10 * chance.random() + 3 * place
            learned = 0.25 * (1 + block / 12) * (1 + 0.3 * place)
            dropped = 0.02 * (1 + place) * (1 + chance.random())
            layers.append(
                LayerFacts(
                    f"model.layers.{block}.{module}",
                    sorted((learned * (0.62 + 0.1 * chance.random()) ** i for i in range(8)), reverse=True),
                    sorted((dropped * (0.9 - 0.04 * chance.random()) ** i for i in range(8)), reverse=True),
                    largest,
                    1e-6 * (1 + place) * (1 + chance.random()),
                )
            )
    return layers


def samples(champion: bool = True) -> list[SampleFacts]:
    """Eight movie reviews with one-word answers."""
    kept = []
    for text, right, base in REVIEWS:
        outputs = {"base": base, "adapted": right} | ({"champion": right} if champion else {})
        prompt = f"Movie review: {text}\nIs this review positive or negative? Answer with one word."
        kept.append(SampleFacts(prompt, [right], outputs))
    return kept


def full_facts(**changes: Any) -> ReportFacts:
    """A promoted run with a champion; `changes` replace fields."""
    facts: dict[str, Any] = {
        "title": "quickstart",
        "finished": "2026-07-14 16:42 UTC",
        "verdict": "Accuracy rose from 48.0% to 89.0% on 400 held-out rows; the whole interval lies above zero and "
        "above the champion's 84.3%.",
        "promoted": True,
        "model_uri": "models:/quickstart@champion",
        "gate_metric": "accuracy",
        "metrics": {
            "base": {"accuracy": 0.48, "loss": 2.9127, "perplexity": 18.407},
            "adapted": {"accuracy": 0.89, "loss": 0.2714, "perplexity": 1.3118},
            "champion": {"accuracy": 0.8425, "loss": 0.3502, "perplexity": 1.4194},
        },
        "intervals": {
            "base": {"accuracy": [0.4325, 0.5275], "loss": [2.81, 3.02]},
            "adapted": {"accuracy": [0.8575, 0.92], "loss": [0.229, 0.318]},
        },
        "differences": {
            "accuracy": Interval(0.41, 0.3525, 0.465),
            "loss": Interval(-2.6413, -2.7521, -2.5288),
        },
        "harness": [],
        "heldout_rows": 400,
        "truncation": TruncationFacts(
            rule="activation",
            rank=8,
            tokens=2051,
            base_loss=3.4879,
            truncated_loss=3.4823,
            worst=[("model.layers.1.self_attn.v_proj", 3.4891), ("model.layers.0.mlp.up_proj", 3.4874)],
            warning=None,
        ),
        "training": training_records(80),
        "layers": layer_facts(),
        "samples": samples(),
        "stages": [
            StageFacts("prepare_dataset", "computed", 2.31, "3f9c2a" * 10 + "d41d", "9f3d8c1ab24e4d0c8e0b7a61f2c5d934"),
            StageFacts("compute_spectra", "reused", 14.8, "b07e11" * 10 + "8c2f", "01c7e6d5b3a94f2e8d7c6b5a49382716"),
            StageFacts("audit", "computed", 11.2, "5d1c77" * 10 + "7b3e", "1d2c3b4a5f6e7d8c9b0a1f2e3d4c5b6a"),
            StageFacts("train_adapter", "computed", 212.4, "c4551d" * 10 + "09aa", "7e6d5c4b3a2918f7e6d5c4b3a2918f70"),
            StageFacts("evaluate", "computed", 96.2, "77ab90" * 10 + "f00d", "5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d"),
            StageFacts("register", "computed", 1.05, "e19d3b" * 10 + "4b1d", "2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e"),
        ],
        "dataset": {
            "form": "prompt-completion",
            "rows": {"read": 2041, "training": 1280, "heldout": 400, "rejected": 3, "duplicates": 17},
            "split": {"heldout_share": 0.2, "seed": 0},
            "longest_tokens": 118,
            "sources": ["embedded:movie-reviews"],
            "sha256": "9b74c9897bac770ffc029102a200c5de" * 2,
        },
        "interruptions": ["training worker 1 died: it was killed, or its node is gone (failure 1; 3 are survived)"],
        "rejected_rows": [
            "movie-reviews.jsonl:212: 131 tokens, more than data.max_tokens 128",
            "movie-reviews.jsonl:977: empty completion",
            "movie-reviews.jsonl:1500: 140 tokens, more than data.max_tokens 128",
        ],
        "recipe_yaml": "name: quickstart\nbase:\n  model: embedded:smollm2-135m-instruct\nadapter:\n  rank: 8\n"
        "  alpha: 16.0\n  targets: all-linear\ntrain:\n  workers: 2\n  deepspeed: cpu_zero2\n  learning_rate: 0.0005\n",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "ray": "2.60.0", "mlflow": "3.17.2"},
        "machine": {"host": "thinkpad", "cpu": "8 cores", "memory": "30.9 GiB", "gpu": "none"},
        "commands": {
            "Ask the model": 'kasa ask models:/quickstart@champion "Movie review: a gorgeous, witty, seductive movie."',
            "Open the MLflow interface": "mlflow ui --backend-store-uri sqlite:///workspace/mlflow.db",
        },
    }
    return ReportFacts(**(facts | changes))
