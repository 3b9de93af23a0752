"""A base model with an adapter, loaded to answer texts: with generated text, or with the labels of a trained head.

`kasa generate`, registered models, the evaluation, lm-evaluation-harness and `kasa judge` all load models here. Of a registered
model the adapter is in the registry; its base is not and has to be found and compared. The registry's code (`served_model`)
runs this in processes that have no checkout, so nothing here may need Ray or MLflow.

Legend: B = texts, T = tokens, C = outputs of the head.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kasa import KasaError, read_adapter
from kasa.adapter_file import check_base
from pipeline.config.settings import BaseSettings
from pipeline.core.errors import ModelError
from pipeline.core.files import machine_cache
from pipeline.methods.loading import attach_folder
from pipeline.models.base import BaseModel, find_base
from pipeline.models.forward import Sample, collate_labelled, head_outputs, padding_token, vocabulary_size
from pipeline.models.loading import greedy_settings, load_base
from pipeline.models.prompting import (
    LANGUAGE_MODEL,
    PAIR_SEPARATOR,
    Head,
    Message,
    Prompting,
    check_tokens,
    encode_texts,
    load_tokenizer,
)
from pipeline.serving.requests import GREEDY, Decoding

_PROMPTS_PER_BATCH = 16
_LABELLED_TEXTS_PER_BATCH = 32

BASE_VARIABLE = "KASA_BASE_MODEL"


@dataclass(frozen=True)
class Prediction:
    """What a trained head says of one text.

    Attributes:
        label: the name of the likeliest class, or the value of a regression.
        probabilities: of every class by its name; empty for a regression.
    """

    label: str | float
    probabilities: dict[str, float]

    def __str__(self) -> str:
        return self.label if isinstance(self.label, str) else f"{self.label:.6g}"


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, in evaluation mode, with what it takes to ask it.

    Attributes:
        model: the base with the adapter attached.
        tokenizer: the base's.
        head: the base's language model, or a trained head; it decides which methods apply.
        prompting: the form that training gave to prompts. A trained head reads texts as they are.
    """

    model: nn.Module
    tokenizer: Any
    head: Head
    prompting: Prompting

    def answers(
        self, asked: Sequence[str | Sequence[Message]], max_new_tokens: int, decoding: Decoding = GREEDY
    ) -> list[str]:
        """One answer for each request, from either kind of head.

        Args:
            asked: prompts as a person types them, conversations that end with a user turn, or texts to label (pairs joined by
                `PAIR_SEPARATOR`).
            max_new_tokens: length limit of generated answers; a trained head ignores it, as it does `decoding`.

        Raises:
            TemplateError: the chat template rejects a conversation.
        """
        if self.head.is_new:
            return [str(prediction) for prediction in self.predictions([str(text) for text in asked])]
        turns = [[Message("user", one)] if isinstance(one, str) else one for one in asked]
        prompts = [self.prompting.conversation_ids(self.tokenizer, one) for one in turns]
        return [
            text
            for start in range(0, len(prompts), _PROMPTS_PER_BATCH)
            for text in self.generate(prompts[start : start + _PROMPTS_PER_BATCH], max_new_tokens, decoding)
        ]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, decoding: Decoding = GREEDY) -> list[str]:
        """Decoding of a batch of tokenised prompts, each to its first stop token or text; without that, special tokens and
        outer white space.

        Raises:
            BaseModelError: a prompt has a token that the model has no embedding for.
        """
        check_tokens(self.tokenizer, prompts, vocabulary_size(self.model))
        device = next(self.model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        settings = _greedy(self.model, self.tokenizer)
        settings.max_new_tokens = max_new_tokens
        if decoding.temperature:
            settings.do_sample, settings.top_k = True, 0  # transformers would take the likeliest 50 alone
            settings.temperature, settings.top_p = decoding.temperature, decoding.top_p
        pad = settings.pad_token_id
        input_ids_BT = torch.full((len(prompts), longest), pad, device=device)
        mask_BT = torch.zeros_like(input_ids_BT)
        # Padded on the left: a decoder continues after the last position.
        for row, prompt in enumerate(prompts):
            input_ids_BT[row, longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
            mask_BT[row, longest - len(prompt) :] = 1
        output_BT = self.model.generate(  # type: ignore[operator]
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            generation_config=settings,
            stopping_criteria=[partial(self._stopped, longest, settings.eos_token_id, decoding.stop)]
            if decoding.stop
            else None,
        )
        texts = self._texts(output_BT[:, longest:], settings.eos_token_id)
        return [_before_texts(decoding.stop, text).strip() for text in texts]

    def _stopped(
        self, start: int, ends: Sequence[int] | None, stop: Sequence[str], ids_BT: torch.Tensor, scores: Any
    ) -> torch.Tensor:
        """Which rows hold a text to stop at after the position `start`, by transformers' interface of criteria."""
        texts = self._texts(ids_BT[:, start:], ends)
        return torch.tensor([any(one in text for one in stop) for text in texts], device=ids_BT.device)

    def _texts(self, ids_BT: torch.Tensor, ends: Sequence[int] | None) -> list[str]:
        answers = [_before(ends, ids) for ids in ids_BT.tolist()]
        texts: list[str] = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

    def predictions(self, texts: Sequence[str]) -> list[Prediction]:
        """Labels of texts, tokenised as in training; a head for pairs splits each text at `PAIR_SEPARATOR`."""
        parts = [text.split(PAIR_SEPARATOR, 1) if self.head.pairs else [text] for text in texts]
        samples = [encode_texts(self.tokenizer, one) for one in parts]
        found = []
        for start in range(0, len(samples), _LABELLED_TEXTS_PER_BATCH):
            outputs_BC = self.outputs(samples[start : start + _LABELLED_TEXTS_PER_BATCH])
            found += [self._prediction(outputs_C) for outputs_C in outputs_BC]
        return found

    @torch.inference_mode()
    def outputs(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Outputs of a trained head for tokenised samples: fp32, on the CPU, shape (B, C).

        Raises:
            BaseModelError: a sample has a token that the model has no embedding for.
        """
        check_tokens(self.tokenizer, (sample["input_ids"] for sample in samples), vocabulary_size(self.model))
        batch = collate_labelled(samples, padding_token(self.model)).to(next(self.model.parameters()).device)
        return head_outputs(self.model, batch).cpu()

    def _prediction(self, outputs_C: torch.Tensor) -> Prediction:
        if self.head.kind == "regression":
            return Prediction(float(outputs_C[0]), {})
        probabilities = outputs_C.double().softmax(dim=0).tolist()
        classes = self.head.classes
        return Prediction(classes[int(outputs_C.argmax())], dict(zip(classes, probabilities, strict=True)))


def _greedy(model: Any, tokenizer: Any) -> Any:
    config = model.config.get_text_config()
    return greedy_settings(model.generation_config, config, tokenizer, vocabulary_size(model))


def _before(ends: Sequence[int] | None, ids: Sequence[int]) -> Sequence[int]:
    """The ids before the first of `ends`."""
    return ids[: next((place for place, token in enumerate(ids) if token in (ends or ())), len(ids))]


def _before_texts(stop: Sequence[str], text: str) -> str:
    """The text before the first of `stop`."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]


def load_model(
    base: Path,
    adapter: Path | None,
    precision: str,
    head: Head | None = None,
    prompting: Prompting | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a base model and attach an adapter, on the GPU if there is one.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter; None loads the plain base.
        precision: `fp32` or `bf16`.
        head: None takes the adapter's, or the base's own language model without an adapter.
        prompting: None takes the adapter's, or plain prompts without one or below a trained head.
        seed: of a new head that no adapter replaces.

    Raises:
        AdapterFileError: the adapter is damaged, or made for another architecture.
        ModelError: `head.json` or `prompting.json` of the adapter is damaged, or the latter is missing.
    """
    if head is None:
        head = Head.load(adapter) if adapter else LANGUAGE_MODEL
    if prompting is None:
        prompting = Prompting.load(adapter) if adapter and not head.is_new else Prompting()
    model: Any = load_base(base, precision, head, seed)
    tokenizer = load_tokenizer(base)
    if not head.is_new:
        # For all who generate with it, lm-evaluation-harness too; `generate` fills what is not set from here.
        model.generation_config = _greedy(model, tokenizer)
    if adapter:
        attach_folder(model, adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return LoadedModel(model, tokenizer, head, prompting)


def load_registered(adapter: Path, config: Mapping[str, Any], base: Path | None = None) -> LoadedModel:
    """Load the adapter of a model version on the base it was trained on.

    Args:
        adapter: the version's adapter folder.
        config: the version's configuration, written by `pipeline.run.model_package`.
        base: where the base is; None looks where `KASA_BASE_MODEL` says, where it was at training, and on the hub.

    Raises:
        ModelError: the base is nowhere to be found, or is another one.
        AdapterFileError: the base's adapted weights are others; the first of them is named.
    """
    found = _find_base(config, base)
    if found.digest != config["base_digest"]:
        check_base(read_adapter(adapter), found.folder)
        raise ModelError(
            f"{found.folder} is not the base model {found.name} that the adapter was trained on: its adapted weights are "
            "the same, but other weights, the configuration or the tokenizer's files differ"
        )
    return load_model(found.folder, adapter, config["precision"])


def _find_base(config: Mapping[str, Any], base: Path | None) -> BaseModel:
    name, recorded = config["base_name"], config["base_folder"]
    given = str(base) if base else os.environ.get(BASE_VARIABLE)
    if given and not _is_model(given):
        option = "--base" if base else BASE_VARIABLE
        raise ModelError(f"{option} is {given}, which is no model folder; it should hold {name}")
    for place in (given, recorded):
        if place and _is_model(place):
            placed = find_base(BaseSettings(model=str(Path(place).absolute())), machine_cache())
            assert placed is not None  # only a look without fetching finds nothing
            return replace(placed, name=name)
    try:
        if not is_hub_id(name):
            raise ModelError("it has no hub id")
        found = find_base(BaseSettings(model=name, revision=config["base_revision"]), machine_cache())
    except KasaError as error:
        raise ModelError(
            f"the base model {name} is not at {recorded} ({error}); set {BASE_VARIABLE} to the folder that holds it"
        ) from None
    assert found is not None  # only a look without fetching finds nothing
    return found


def _is_model(folder: str) -> bool:
    return (Path(folder) / "config.json").is_file()


def is_hub_id(name: str) -> bool:
    """Whether a base's name is `ORGANISATION/NAME` on the hub, not a folder."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))
