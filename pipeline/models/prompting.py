"""What a model is asked, and what its outputs mean: prompts as token ids, and the head.

Text becomes token ids in the same way for training, evaluation and serving. An adapter has a `prompting.json` beside it.
Generation starts from exactly the tokens that training put before the answer; see `_continue`.

The head is the base's own language model head, or a new head that predicts a class or a number. A new head is trained in full
beside the adapter and stored with it; `head.json` beside both says what its outputs mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings import DataSettings, HeadKind
from pipeline.core.errors import BaseModelError, DataError, ModelError, one_line
from pipeline.models.chat import IGNORED, TOOLS, Encoded, Message, Tokenizer, check_plain, encode_sequences, render
from pipeline.models.token_ids import ids_of, ids_with_bos, start_ids

if TYPE_CHECKING:
    from torch import nn

HEAD_FILE = "head.json"
# Separates the two texts of a pair where only one text can be given, as in `kasa generate`.
PAIR_SEPARATOR = " ||| "

PROMPTING_FILE = "prompting.json"
PLACE = "{prompt}"


@dataclass(frozen=True)
class Head:
    """The head of a model.

    Attributes:
        kind: `language-model` is the base's own head; the others are new.
        classes: The names of the classes in the order of the outputs; empty unless `kind` is `classification`.
        pairs: Whether it was trained on pairs of texts.
    """

    kind: HeadKind = "language-model"
    classes: tuple[str, ...] = ()
    pairs: bool = False

    @property
    def is_new(self) -> bool:
        """Whether it is a new head, which is trained in full beside the adapter."""
        return self.kind != "language-model"

    @property
    def outputs(self) -> int:
        """How many numbers a new head gives for each text."""
        return len(self.classes) if self.kind == "classification" else 1

    def save(self, folder: Path) -> None:
        """Write `head.json` into a folder. Nothing is written for the base's own head."""
        if self.is_new:
            text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
            folder.joinpath(HEAD_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Head:
        """Read `head.json` from a folder. Without such a file it is the base's own head.

        Raises:
            ModelError: The file is damaged.
        """
        path = folder / HEAD_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(values["kind"], tuple(values["classes"]), values["pairs"])
        except FileNotFoundError:
            return LANGUAGE_MODEL
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{path} is damaged ({error}); copy it again from the run that made it") from None


LANGUAGE_MODEL = Head()


def head_modules(model: nn.Module) -> list[str]:
    """The names of the modules of the new head of a model for labels: those beside its body, and those parts of the body that
    begin anew (`pipeline.models.loading` marks them)."""
    body = str(model.base_model_prefix)
    new_parts: list[str] = getattr(model, "new_parts", [])
    return new_parts + [
        name for name, module in model.named_children() if name != body and any(True for _ in module.parameters())
    ]


@dataclass(frozen=True)
class Prompting:
    """How prompts are written.

    Attributes:
        prompt_template: Wraps the prompt of the user, which replaces `{prompt}`.
        chat_template: Whether the tokenizer's chat template then wraps the conversation.
        system_prompt: Begins the conversation, unless that has a system message of its own.
    """

    prompt_template: str = PLACE
    chat_template: bool = False
    system_prompt: str | None = None

    @classmethod
    def from_settings(cls, data: DataSettings, tokenizer: Tokenizer, form: str = "auto") -> Prompting:
        """The prompting that a recipe asks for. If it leaves `chat_template` open, the tokenizer decides.

        Args:
            form: The form of the data, once it is known. `completion` is plain text and takes no template of either kind.
                `chat` goes without a chat template only if the recipe says so, and takes no prompt template beside one.

        Raises:
            DataError: The settings contradict each other, the form or the tokenizer.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token, so answers could never end; set its eos_token")
        return cls.decided(data, bool(tokenizer.chat_template), form)

    @classmethod
    def decided(cls, data: DataSettings, has_template: bool, form: str) -> Prompting:
        """As `from_settings`, for a tokenizer that has a chat template or has none."""
        chat = has_template if data.chat_template is None else data.chat_template
        if form == "completion":
            chat = bool(data.chat_template)
        if chat and not has_template:
            raise DataError("data.chat_template is true, but the tokenizer has no chat template; set it to false")
        _check_form(data, form, chat)
        if data.system_prompt is not None and not chat:
            raise DataError(
                f"data.system_prompt {data.system_prompt!r} needs a chat template, which is not in use here; "
                "remove it or put its text into data.prompt_template"
            )
        return cls(data.prompt_template, chat, data.system_prompt)

    def save(self, folder: Path) -> None:
        """Write `prompting.json` into a folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        folder.joinpath(PROMPTING_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Prompting:
        """Read `prompting.json` from a folder.

        Raises:
            ModelError: The file is missing or damaged.
        """
        path = folder / PROMPTING_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ModelError(
                f"{path} does not exist, so how prompts were written is unknown; was the folder copied whole?"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{path} is damaged ({error}); copy it again from the run that made it") from None

    def wrap(self, prompt: str) -> str:
        """The prompt in the prompt template."""
        return self.prompt_template.replace(PLACE, prompt)

    def wrapped(self, conversation: Sequence[Message]) -> list[Message]:
        """The turns of a conversation with each prompt in the prompt template."""
        return [
            turn._replace(content=self.wrap(turn.content)) if turn.role == "user" else turn for turn in conversation
        ]

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """The token ids from which the answer to a prompt is generated.

        Raises:
            TemplateError: The chat template rejects the conversation.
        """
        return self.conversation_ids(tokenizer, [Message("user", prompt)])

    def conversation_ids(self, tokenizer: Tokenizer, conversation: Sequence[Message]) -> list[int]:
        """The token ids from which the answer to a conversation is generated, which ends with a user turn.

        Without a chat template the turns become paragraphs, with each prompt in the prompt template.

        Raises:
            TemplateError: The chat template rejects the conversation.
        """
        turns = self.wrapped(conversation)
        if not self.chat_template:
            return start_ids(tokenizer, "\n\n".join(turn.content for turn in turns))
        return ids_of(tokenizer, render(tokenizer, self._opened(turns), generation=True))

    def answer_ids(self, tokenizer: Tokenizer, prompt: str, answer: str) -> list[int]:
        """The token ids of an answer, ended by EOS as in training. They continue `prompt_ids` of the same prompt.

        Raises:
            TemplateError: The chat template rejects the conversation.
        """
        encoded = self.encode(tokenizer, [Message("user", self.wrap(prompt)), Message("assistant", answer)])
        return encoded.input_ids[encoded.prompt_tokens :]

    def encode(self, tokenizer: Tokenizer, conversation: Sequence[Message]) -> Encoded:
        """Tokenise a conversation that ends with an assistant turn.

        Every assistant turn that is to be learned is labelled, and the last id is EOS. User turns are taken as they are:
        apply `wrapped` first. A lone assistant turn is plain text: all of it is labelled, and no chat template is applied.
        Without a chat template the turns before the last become the paragraphs of its prompt, and it alone is labelled.
        Where the chat template rewrites earlier turns, this is the last of `encode_sequences`.

        Raises:
            TemplateError: The chat template rejects the conversation, leaves out a part of it, or writes something before an
                answer that this answer does not begin with.
        """
        if [turn.role for turn in conversation] == ["assistant"]:
            return _encode_text(tokenizer, conversation[0].content)
        if self.chat_template:
            return self.encode_sequences(tokenizer, conversation)[-1][1]
        check_plain(conversation)
        *before, answer = (turn.content for turn in conversation)
        return _encode_pair(tokenizer, "\n\n".join(before), answer)

    def encode_sequences(
        self, tokenizer: Tokenizer, conversation: Sequence[Message]
    ) -> list[tuple[list[int], Encoded]]:
        """Tokenise a conversation that ends with an answer to be learned, as `encode` does.

        Returns:
            The sequences that together learn each answer once, each with the places of the answers that it learns. There are
            several only where the chat template rewrites earlier turns (`pipeline.models.chat`).

        Raises:
            TemplateError: As `encode`.
        """
        if not self.chat_template or len(conversation) == 1:
            return [([len(conversation) - 1], self.encode(tokenizer, conversation))]
        opened = self._opened(conversation)
        added = len(opened) - len(conversation)
        return [
            ([place - added for place in learned], encoded) for learned, encoded in encode_sequences(tokenizer, opened)
        ]

    def _opened(self, conversation: Sequence[Message]) -> list[Message]:
        """The conversation with the system prompt, unless it has a system turn of its own."""
        turns = list(conversation)
        place = int(bool(turns) and turns[0].role == TOOLS)
        if self.system_prompt is not None and [turn.role for turn in turns[place : place + 1]] != ["system"]:
            turns.insert(place, Message("system", self.system_prompt))
        return turns


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a local Hugging Face folder.

    Its own warnings about long texts are turned off, because the pipeline checks lengths itself.

    Raises:
        BaseModelError: The folder holds no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its many tokenizer formats raise
        if find_spec("sentencepiece") is None and list(folder.glob("*.model")):
            raise BaseModelError(
                f"the tokenizer in {folder} is a sentencepiece model; install the package that reads it: pip install sentencepiece"
            ) from None
        raise BaseModelError(
            f"no tokenizer can be loaded from {folder}: {one_line(error)}; copy the whole model folder"
        ) from None
    tokenizer.model_max_length = 10**30
    return tokenizer


def embedded_tokens(folder: Path) -> int | None:
    """How many tokens the model in a folder has an embedding for, by its configuration; None without one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    count: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return count


def check_tokens(tokenizer: Tokenizer, sequences: Iterable[Any], count: int | None) -> None:
    """Make sure that the model has an embedding for every token of the sequences.

    Args:
        count: How many tokens the model has an embedding for; None if it is not known.

    Raises:
        BaseModelError: It has none for some token, which is named.
    """
    last = max((int(max(ids)) for ids in sequences if len(ids)), default=0)
    if count is not None and last >= count:
        raise BaseModelError(
            f"the base's tokenizer makes token {last}, {tokenizer.convert_ids_to_tokens(last)!r}, and the base has embeddings "
            f"for tokens 0 to {count - 1} alone; use the tokenizer that belongs to the base, or keep the token out of the text"
        )


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, list[int]]:
    """Tokenise a text or a pair of texts for a new head: `input_ids`, and `token_type_ids` if the tokenizer gives them."""
    encoded = tokenizer(*texts)
    return {name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}


def _check_form(data: DataSettings, form: str, chat: bool) -> None:
    if form == "completion" and chat:
        raise DataError("data.chat_template is true, but data of form completion is plain text; remove it")
    if form == "chat" and not chat and data.chat_template is None:
        raise DataError(
            "data of form chat needs a chat template, and the tokenizer has none; choose an instruction-tuned base, or set "
            "data.chat_template: false to write its turns as paragraphs and learn the last one"
        )
    if (form == "completion" or (form == "chat" and chat)) and data.prompt_template != PLACE:
        raise DataError(f"data.prompt_template {data.prompt_template!r} has no place in data of form {form}; remove it")


def _encode_text(tokenizer: Tokenizer, text: str) -> Encoded:
    ids = [*ids_with_bos(tokenizer, text), tokenizer.eos_token_id]
    return Encoded(ids, list(ids), 0)


def _encode_pair(tokenizer: Tokenizer, prompt: str, completion: str) -> Encoded:
    start = start_ids(tokenizer, prompt)
    whole = ids_with_bos(tokenizer, prompt + completion)
    if whole[: len(start)] != start:
        whole = start + ids_of(tokenizer, prompt[len(prompt.rstrip(" ")) :] + completion)
    ids = [*whole, tokenizer.eos_token_id]
    return Encoded(ids, [IGNORED] * len(start) + ids[len(start) :], len(start))
