"""Exports in other programs' hands: chat messages get the answers of `kasa generate`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from kasa import save_adapter
from pipeline.core.errors import ModelError
from pipeline.models.base import BaseModel
from pipeline.models.prompting import Message, Prompting
from pipeline.serving import answer as serving_answer
from pipeline.serving.answer import answer
from pipeline.serving.export import Exported, Format, export
from tests.support.interchange import random_adapter
from tests.support.tiny_inputs import write_tiny_inputs

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPTS = [f"count {number} from {number * 7}" for number in range(6)]
TURNS = [Message("user", "count 1"), Message("assistant", "1 done"), Message("user", "count 2 ")]
FORMS = {
    "wrapped": Prompting("Q: {prompt}\nA: "),
    "chat": Prompting("{prompt}!", chat_template=True, system_prompt="you count"),
    "no template under a base that has one": Prompting(),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with a chat template, two ends, and generation settings of its own."""
    write_tiny_inputs(tmp_path)
    folder = tmp_path / "base"
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    asked = {"eos_token_id": [0, 7], "repetition_penalty": 9.0, "do_sample": True, "temperature": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    return folder


def saved(folder: Path, base: Path, prompting: Prompting) -> Path:
    save_adapter(folder, random_adapter(BaseModel("", base), "weight"))
    prompting.save(folder)
    return folder


def exported(adapter: Path, form: Any) -> Exported:
    out = adapter.with_name(f"out {form}")
    return export(
        str(adapter), out, form, adapter.parent / "work", None, False, "fp32" if form == "merged" else "stored"
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_export_carries_the_template_and_the_ends_of_the_training(tmp_path: Path, base: Path, form: str) -> None:
    prompting = FORMS[form]
    adapter = saved(tmp_path / "adapter", base, prompting)
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    wanted = prompting.conversation_ids(tokenizer, TURNS)
    for kind in get_args(Format):
        out = exported(adapter, kind).out
        template = (out / "chat_template.jinja").read_text()
        ids = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
        assert ids["input_ids"] == wanted
        settings = json.loads((out / "generation_config.json").read_text())
        assert settings == {"do_sample": False, "eos_token_id": [0, 7], "pad_token_id": 0}
        assert GenerationConfig.from_pretrained(out).eos_token_id == [0, 7]
    own = AutoTokenizer.from_pretrained(tmp_path / "out merged")
    assert own.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == wanted


@pytest.mark.parametrize("form", FORMS)
def test_messages_get_the_answers_of_kasa_generate(
    tmp_path: Path, base: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The exports are stored in fp32 and run in it; with bf16, where the processor has it, there are ties.
    monkeypatch.setattr(serving_answer, "fast_precision", lambda gpu: "fp32")
    adapter = saved(tmp_path / "adapter", base, FORMS[form])
    typed = answer(str(adapter), PROMPTS, tmp_path / "work", base, 8)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    folder = exported(adapter, "merged").out
    assert answer(str(folder), PROMPTS, tmp_path / "work", None, 8) == typed
    merged = pipeline("text-generation", model=str(folder))
    said = [one[0]["generated_text"][-1]["content"].strip() for one in merged(chats, max_new_tokens=8)]
    assert said == typed
    lora = exported(adapter, "lora").out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = GenerationConfig.from_pretrained(lora, max_new_tokens=8)
    model.base_model.model.generation_config = settings
    for chat, wanted in zip(chats, typed, strict=True):
        inputs = tokenizer.apply_chat_template(
            chat, chat_template=(lora / "chat_template.jinja").read_text(), add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
        ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == wanted
    assert all(typed)


def test_the_commands_after_an_export_work_from_any_folder(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(tmp_path / "adapter", base, FORMS["wrapped"])
    monkeypatch.chdir(tmp_path)
    lora = export("adapter", Path("a lora"), "lora", Path("work"), Path("base"), True, "stored")
    out = str(tmp_path / "a lora")
    assert shlex.split(lora.command) == [
        "vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"a lora={out}",
        "--chat-template", f"{out}/chat_template.jinja", "--generation-config", out,
    ]  # fmt: skip
    merged = exported(adapter, "merged")
    assert shlex.split(merged.command) == ["vllm", "serve", str(tmp_path / "out merged")]
    for made, name in ((lora, "a lora"), (merged, str(tmp_path / "out merged"))):
        assert made.request
        address, *options = shlex.split(made.request)[1:]
        assert address == "http://localhost:8000/v1/chat/completions"
        assert options[:-1] == ["-H", "Content-Type: application/json", "-d"]
        said = json.loads(options[-1])
        assert (said["model"], said["messages"][0]["role"], said["temperature"]) == (name, "user", 0)
    with pytest.raises(ModelError, match="is merged and needs no base"):
        answer(str(merged.out), PROMPTS, Path("work"), base, 8)
