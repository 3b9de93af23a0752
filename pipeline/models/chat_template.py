"""The form of a model's prompts and the end of its answers, for programs that read Hugging Face folders and not `prompting.json`.

A server of chats renders a list of messages with a Jinja template, and stops at the ids of `generation_config.json`. The
template written here renders exactly the tokens from which `Prompting.conversation_ids` generates.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.core.errors import BaseModelError, one_line
from pipeline.models.loading import greedy_settings
from pipeline.models.prompting import PLACE, Prompting, Tokenizer, load_tokenizer
from pipeline.models.token_ids import ids_of, ids_with_bos

CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"

# A content is a text, or a list of parts; texts of parts stand one a line, as they do in training data.
_CONTENT = """\
{%- set content = message['content'] -%}
{%- if content is not string -%}
{%- if content | rejectattr('type', 'equalto', 'text') | list -%}
{{- raise_exception('this model reads text alone') -}}
{%- endif -%}
{%- set content = content | map(attribute='text') | join('\\n') -%}
{%- endif -%}
"""
# The turns as paragraphs. An answer at the end continues its prompt and is ended; spaces before an answer are its own.
_PARAGRAPHS = """\
{%- set kasa = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'developer', 'user', 'assistant'] -%}
{{- raise_exception('this model knows no role ' ~ message['role']) -}}
{%- endif -%}
CONTENT
{%- if loop.last and message['role'] == 'assistant' -%}
{%- set kasa.text = kasa.text ~ content ~ EOS -%}
{%- else -%}
{%- set kasa.text = kasa.text ~ ('' if loop.first else '\\n\\n') ~ (WRAPPED if message['role'] == 'user' else content) -%}
{%- if loop.last -%}
{%- set kasa.text = kasa.text.rstrip(' ') -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
# What the base's template gets to see. Its own text follows on a line of its own, as if it stood alone.
_MESSAGES = """\
{%- set kasa = namespace(messages=SYSTEM if messages[0]['role'] not in ['system', 'developer'] else []) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
CONTENT
{%- set kasa.messages = kasa.messages + [{'role': 'user', 'content': WRAPPED}] -%}
{%- elif message['role'] == 'developer' -%}
{%- set kasa.messages = kasa.messages + [{'role': 'system', 'content': message['content']}] -%}
{%- else -%}
{%- set kasa.messages = kasa.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = kasa.messages %}
"""


def chat_template(prompting: Prompting, tokenizer: Tokenizer) -> str:
    """The Jinja template that renders messages as the training did.

    The tokens that it renders, tokenised without special tokens as chat servers do, are those of
    `Prompting.conversation_ids`; BOS is in the text where the tokenizer puts one before a text that stands alone. Messages
    that end with an assistant turn are rendered with that answer and its EOS.

    Raises:
        BaseModelError: Prompts were in the tokenizer's chat template, and it has none.
    """
    wrapped = " ~ content ~ ".join(_quoted(part) for part in prompting.prompt_template.split(PLACE))
    if not prompting.chat_template:
        parts = {"EOS": _quoted(tokenizer.eos_token or ""), "WRAPPED": wrapped, "CONTENT\n": _CONTENT}
        return _filled(_PARAGRAPHS, parts) + _opened(tokenizer)
    try:
        own: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise BaseModelError(f"the base's tokenizer has lost its chat template: {one_line(error)}") from None
    if prompting.prompt_template == PLACE and prompting.system_prompt is None:
        return own
    system = prompting.system_prompt
    first = "[]" if system is None else f"[{{'role': 'system', 'content': {_quoted(system)}}}]"
    return _filled(_MESSAGES, {"SYSTEM": first, "WRAPPED": wrapped, "CONTENT\n": _CONTENT}) + own


def chat_files(prompting: Prompting, base: Path) -> dict[str, str]:
    """What a folder needs beside a model, by file name: the chat template, and settings under which answers end as trained.

    Args:
        base: The folder of the base model.

    Raises:
        BaseModelError: The base has no tokenizer or configuration that can be loaded, or lost its chat template.
    """
    from transformers import AutoConfig, GenerationConfig

    tokenizer = load_tokenizer(base)
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{base / 'config.json'} cannot be read: {one_line(error)}") from None
    try:
        declared = GenerationConfig.from_pretrained(base, local_files_only=True)
    except OSError:
        declared = GenerationConfig()
    text_config = config.get_text_config()
    settings = greedy_settings(declared, text_config, tokenizer, text_config.vocab_size)
    kept = {name: getattr(settings, name) for name in ("do_sample", "eos_token_id", "pad_token_id")}
    return {
        CHAT_TEMPLATE_FILE: chat_template(prompting, tokenizer),
        GENERATION_FILE: json.dumps(kept, indent=2) + "\n",
    }


def tokenizer_settings(base: Path, template: str) -> dict[str, str]:
    """The base's `tokenizer_config.json` with a template in the place of its own, by file name; nothing where it has no such
    file."""
    try:
        settings: dict[str, Any] = json.loads((base / TOKENIZER_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    changed = settings | {"chat_template": template}
    return {TOKENIZER_FILE: json.dumps(changed, indent=2, ensure_ascii=False) + "\n"}


def _opened(tokenizer: Tokenizer) -> str:
    """Write `kasa.text` after what the tokenizer puts before a text that stands alone."""
    plain, spaced = (_quoted(_opening(tokenizer, text)) for text in ("a", " a"))
    opening = plain if plain == spaced else f"({spaced} if kasa.text.startswith(' ') else {plain})"
    if bos := tokenizer.bos_token:
        once, twice = _quoted(bos), _quoted(bos * 2)
        # A text that spells BOS out has it once.
        opening = f"('' if kasa.text.startswith({once}) and not kasa.text.startswith({twice}) else {opening})"
    return f"{{{{- {opening} ~ kasa.text -}}}}"


def _opening(tokenizer: Tokenizer, text: str) -> str:
    """What to put before `text` so that it has, without special tokens, the ids of a text that stands alone."""
    wanted, own = ids_with_bos(tokenizer, text), ids_of(tokenizer, text)
    before = "".join(tokenizer.convert_ids_to_tokens(wanted[: len(wanted) - len(own)]))
    # Some tokenizers begin a text with a space that they do not add after a special token.
    return next((one for one in (before, f"{before} ") if ids_of(tokenizer, one + text) == wanted), before)


def _filled(template: str, parts: dict[str, str]) -> str:
    """The template with its parts in the place of their names."""
    return re.sub("|".join(parts), lambda name: parts[name[0]], template)


def _quoted(text: str) -> str:
    """A Jinja string literal. Jinja reads the escapes that JSON writes, but no pairs of surrogates."""
    return json.dumps(text, ensure_ascii=False)
