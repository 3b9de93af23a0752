"""Weights that an interrupted decomposition left: what is damaged of them is decomposed again."""

from pathlib import Path
from types import SimpleNamespace

import torch

from kasa.folders import TENSOR_FILE
from kasa.spectra import Triplets
from kasa.spectra_file import save_spectra
from pipeline.run.stages.spectra import _decompose


def test_only_whole_pieces_are_kept(tmp_path: Path, recipe) -> None:
    triplets = Triplets(torch.ones(3, 1), torch.ones(1), torch.ones(1, 4), 2.0, 0.0, 0.0, "gram")
    pieces = [SimpleNamespace(out=tmp_path / name) for name in ("whole", "bytes", "facts", "absent")]
    for piece in pieces[:3]:
        save_spectra(piece.out, {"q": triplets}, {"q": "digest"})
    tensors = pieces[1].out / TENSOR_FILE
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\7")
    facts = pieces[2].out / "spectra.json"
    facts.write_text(facts.read_text().replace('"largest": 2.0', '"largest": 3.0'))
    given: list[SimpleNamespace] = []
    context = SimpleNamespace(
        bars=SimpleNamespace(update=lambda *arguments: None),
        run_tasks=lambda function, items, resources, **callbacks: given.extend(items),
    )
    _decompose(SimpleNamespace(context=context, recipe=recipe()), pieces)  # type: ignore[arg-type]
    assert given == pieces[1:]
