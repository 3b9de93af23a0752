"""Scoring a model with a head: each sample's label beside the prediction, with the outputs it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.journal import Record
from pipeline.labelled_model import sample_losses
from pipeline.prediction import Predictor


def score_labels(predictor: Predictor, samples: Sequence[Any], indices: Sequence[int]) -> list[Record]:
    """The results of samples, `indices` in the held-out split.

    Of a classification `label` and `prediction` are numbers of classes and `logits` one for each; of a regression they are
    values. `loss_sum` is the cross entropy in nats or the squared error.
    """
    import torch

    head = predictor.head
    outputs_BC = predictor.outputs(samples)
    labels_B = torch.tensor([sample["label"] for sample in samples], dtype=torch.float64)
    losses = sample_losses(outputs_BC, labels_B, head).tolist()
    records: list[Record] = []
    for index, sample, loss, outputs in zip(indices, samples, losses, outputs_BC.tolist(), strict=True):
        result: Record = {"sample": index, "loss_sum": loss, "tokens": 1, "references": list(sample["references"])}
        if head.kind == "classification":
            chosen, label = outputs.index(max(outputs)), int(sample["label"])
            result |= {"label": label, "prediction": chosen, "accuracy": float(chosen == label)}
            result["output"] = head.classes[chosen]
        else:
            result |= {"label": sample["label"], "prediction": outputs[0], "output": f"{outputs[0]:.6g}"}
        records.append(result | {"logits": outputs})
    return records
