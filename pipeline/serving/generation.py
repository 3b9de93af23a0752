"""A model with an adapter that answers prompts: what `kasa generate`, the registry's models and the evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.methods.loading import attach_folder
from pipeline.models.loading import load_base
from pipeline.models.prompting import Prompting, load_tokenizer


@dataclass(frozen=True)
class Answerer:
    """A loaded model, its tokenizer, and the form its training gave to prompts."""

    model: nn.Module
    tokenizer: Any
    prompting: Prompting

    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to plain prompts, which are put into the training's form first."""
        token_ids = [self.prompting.prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        return greedy_answers(self.model, self.tokenizer, token_ids, max_new_tokens)


def load_answerer(base: Path, adapter: Path | None, precision: str, prompting: Prompting) -> Answerer:
    """Load a base model, with a saved adapter if one is given, on the GPU if there is one.

    Raises:
        AdapterFileError: the adapter is damaged, or made for another architecture.
    """
    model = load_base(base, precision)
    if adapter:
        attach_folder(model, adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Answerer(model, load_tokenizer(base), prompting)


@torch.inference_mode()
def greedy_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """The likeliest next token, again and again until EOS, for a batch of tokenised prompts."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.full((len(prompts), longest), pad, device=device)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        # Sampling settings of the base would only draw warnings here.
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]
