"""Chat templates that do what those of well-known bases do, each on a tiny tokenizer with its special tokens.

Written anew from their documented behaviour; texts such as default system prompts are shortened.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TOOLS_IN_SYSTEM = """
{%- if tools %}{{ '\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}
"""
CALLS = """
{%- for call in m.tool_calls %}{% set f = call.function or call %}
{{- '\n' if m.content or not loop.first }}<tool_call>
{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}
</tool_call>{% endfor %}
"""

LLAMA_3 = """
{{- bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

SMOLLM2 = """
{%- for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>' ~ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

_TOOL_TURNS = """
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
"""

QWEN_2_5 = f"""
{{{{- '<|im_start|>system\\n' ~ (messages[0].content if messages[0].role == 'system' else 'You are Qwen.') }}}}
{TOOLS_IN_SYSTEM}
{{{{- '<|im_end|>\\n' }}}}
{{%- for m in messages %}}
{{%- if m.role == 'tool' %}}{_TOOL_TURNS}
{{%- elif m.role != 'system' or not loop.first %}}{{{{ '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content or '') }}}}{CALLS}
{{{{- '<|im_end|>\\n' }}}}{{% endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}
"""

# Reasoning is written for the answers after the last question alone, and for the last answer even where there is none.
QWEN_3 = f"""
{{%- if tools or messages[0].role == 'system' %}}
{{{{- '<|im_start|>system\\n' ~ (messages[0].content if messages[0].role == 'system' else '') }}}}{TOOLS_IN_SYSTEM}
{{{{- '<|im_end|>\\n' }}}}{{% endif %}}
{{%- set ns = namespace(last=0) %}}{{% for m in messages %}}{{% if m.role == 'user' %}}{{% set ns.last = loop.index0 %}}{{% endif %}}{{% endfor %}}
{{%- for m in messages %}}
{{%- if m.role == 'tool' %}}{_TOOL_TURNS}
{{%- elif m.role == 'user' %}}{{{{ '<|im_start|>user\\n' ~ m.content ~ '<|im_end|>\\n' }}}}
{{%- elif m.role == 'assistant' %}}
{{%- set content = m.content if m.content is string else '' %}}{{% set thought = '' %}}
{{%- if m.reasoning_content is string %}}{{% set thought = m.reasoning_content %}}
{{%- elif '</think>' in content %}}
{{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}}
{{%- set content = content.split('</think>')[-1].lstrip('\\n') %}}{{% endif %}}
{{{{- '<|im_start|>assistant\\n' }}}}
{{%- if loop.index0 > ns.last and (loop.last or thought) %}}{{{{ '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' }}}}{{% endif %}}
{{{{- content }}}}{CALLS}{{{{ '<|im_end|>\\n' }}}}{{% endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}
{{%- if enable_thinking is defined and not enable_thinking %}}{{{{ '<think>\\n\\n</think>\\n\\n' }}}}{{% endif %}}{{% endif %}}
"""

MISTRAL_V01 = """
{{- bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant/user/...') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content ~ eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}
"""

# The system prompt stands in the last message, if that is the user's; the tools before the last of the user's.
MISTRAL_V03 = """
{%- set ns = namespace(system='', last=0) %}{% set talk = messages %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content ~ '\n\n' %}{% set talk = messages[1:] %}{% endif %}
{%- for m in talk %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}{% for m in talk %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' ~ (ns.system if loop.last else '') ~ m.content ~ '[/INST]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}
{%- if not call.id or call.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}
{{- (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{{ ', ' if not loop.last }}{% endfor %}{{ ']' ~ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' ~ m.content | trim ~ eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id ~ '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported, after an optional system message') }}{% endif %}
{%- endfor %}
"""

GEMMA_2 = """
{{- bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant/user/...') }}{% endif %}
{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""

PHI_3 = """
{%- for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
"""

# Every answer is written without its reasoning, and asked for with the beginning of one.
DEEPSEEK_R1 = """
{%- set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}
{{- bos_token ~ ns.system }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '<|User|>' ~ m.content }}
{%- elif m.role == 'assistant' %}{{ '<|Assistant|>' ~ m.content.split('</think>')[-1] ~ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}
"""


class Family(NamedTuple):
    """A template, the tokenizer's BOS (or None) and EOS, and its other special tokens."""

    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()


FAMILIES = {
    "llama-3": Family(LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "qwen2.5": Family(QWEN_2_5, None, "<|im_end|>", ("<|im_start|>",)),
    "qwen3": Family(QWEN_3, None, "<|im_end|>", ("<|im_start|>",)),
    "mistral-v0.1": Family(MISTRAL_V01, "<s>", "</s>"),
    "mistral-v0.3": Family(
        MISTRAL_V03,
        "<s>",
        "</s>",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "gemma-2": Family(GEMMA_2, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi-3": Family(PHI_3, "<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "deepseek-r1-distill": Family(DEEPSEEK_R1, "<|begin|>", "<|end|>", ("<|User|>", "<|Assistant|>")),
    "smollm2": Family(SMOLLM2, "<|endoftext|>", "<|im_end|>", ("<|im_start|>",)),
}  # fmt: skip


@cache
def tokenizer_of(name: str) -> Any:
    """The tiny tokenizer of a family, with its template."""
    return build(FAMILIES[name])


def build(family: Family) -> Any:
    """A byte-level BPE, which decodes without loss, merges some words, and keeps line breaks together as Llama-3's does."""
    core = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    special = [*filter(None, [family.bos]), family.eos, *family.special]
    corpus = ["user assistant system think tool answer\n\n", "two and two is four; sure, it is"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=family.eos, bos_token=family.bos)
    tokenizer.chat_template = family.template
    return tokenizer


def marked(tokenizer: Any, input_ids: list[int], labels: list[int]) -> str:
    """The text of a sequence with what is learned in ⟦ ⟧."""
    text, start = "", 0
    for place in range(1, len(input_ids) + 1):
        if place == len(input_ids) or (labels[place] >= 0) != (labels[start] >= 0):
            part = tokenizer.decode(input_ids[start:place])
            text += f"⟦{part}⟧" if labels[start] >= 0 else part
            start = place
    return text
