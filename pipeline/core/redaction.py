"""Addresses and messages without their secrets, and commands that can be copied into a shell.

`redacted` stands at every door through which text is shown or enters something that lasts: terminal, files, MLflow, keys.
Two addresses that differ in their login alone are the same afterwards, so a new password changes no key.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TypeVar

Value = TypeVar("Value")

HIDDEN = "***"

# The user's name goes too: services take a token in its place. A password may hold `/` and `@` unescaped, a port may not.
_LOGIN = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/?#:'\"<>]*:(?!\d*(?:[/?#\s]|$))[^\s'\"<>]*@|[^\s/?#'\"<>]*@)"
)
_SECRET_NAME = (
    r"[\w.%-]*(?:token|secret|passw|pwd|signature|credential|auth(?!or)|api-?_?key|access-?_?key|session)[\w.%-]*"
    r"|(?:[\w.%-]*[_.-])?(?:key|sig|jwt|pw|pass|code)|key-pair-id|policy|expires"
    r"|x-(?:amz|goog|ms)-[\w.%-]*|s[et]|sk[et]"
)
_PARAMETER = re.compile(rf"(?P<name>[?&#](?:{_SECRET_NAME})=)[^\s&#'\"<>)]+", re.IGNORECASE)
_HEADER = re.compile(r"(?P<name>\b(?:bearer|basic) )[A-Za-z0-9+/=._~-]{8,}", re.IGNORECASE)
# Tokens of the hubs that data and models come from, which say by their beginning what they are.
_TOKEN = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{12,}")

_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIALS?)$")
# As in `--env HF_TOKEN=...`.
_ASSIGNED = re.compile(rf"(?P<name>\b[A-Z0-9_]*{_SECRET_VARIABLE.pattern.removesuffix('$')}=)[^\s'\"]+")
# A shorter value stands in too many words that are no secret.
_SHORTEST_VALUE = 8


def redacted(text: str) -> str:
    """A text without the logins, tokens and signatures of the addresses in it, and without what this process's environment
    holds as a secret.

    `https://me:pw@host/rows.jsonl?token=t&part=3` becomes `https://host/rows.jsonl?token=***&part=3`.
    """
    for value in _secret_values():
        text = text.replace(value, HIDDEN)
    text = _LOGIN.sub(r"\g<scheme>", text)
    text = _PARAMETER.sub(rf"\g<name>{HIDDEN}", text)
    text = _ASSIGNED.sub(rf"\g<name>{HIDDEN}", text)
    text = _HEADER.sub(rf"\g<name>{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def redacted_values(value: Value) -> Value:
    """A copy of a JSON-ready value with every text in it redacted."""
    changed: object = value
    if isinstance(value, str):
        changed = redacted(value)
    elif isinstance(value, dict):
        changed = {key: redacted_values(one) for key, one in value.items()}
    elif isinstance(value, list | tuple):
        changed = type(value)(redacted_values(one) for one in value)
    return changed  # type: ignore[return-value]


def shell_command(*words: object) -> str:
    """A command that does the same when it is copied into a shell, whatever its words hold; without secrets."""
    return redacted(shlex.join(str(word) for word in words))


def _secret_values() -> list[str]:
    """The longest first: one may be part of another."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_VALUE and "/" not in value[:1] and _SECRET_VARIABLE.search(name)
    }
    return sorted(values, key=len, reverse=True)
