"""The recipes that come along: each can be planned before anything is downloaded."""

from __future__ import annotations

import json

from benchmarks.core import Measurement, Setting, check
from pipeline.config.recipe import named_recipes
from tests.support.processes import start_kasa

PATIENCE_S = 120.0
# A hub without models, and a proxy that leads nowhere, for whatever asks the network none the less.
_NOTHING_AT_HAND = {
    "HF_HUB_OFFLINE": "1",
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
}


@check(bar=0, direction="at most", unit="recipes")
def recipes(setting: Setting) -> Measurement:
    """Recipes that come along of which `kasa run NAME --dry-run` fails in an empty folder, without network and weights."""
    folder = setting.scratch / "recipes"
    folder.mkdir()
    environment = _NOTHING_AT_HAND | {"HF_HOME": str(folder / "hub")}
    failed, parameters = {}, {}
    for name in named_recipes():
        process = start_kasa(["run", name, "--dry-run", "--json"], folder, environment)
        out, said = process.communicate(timeout=PATIENCE_S)
        if process.returncode:
            failed[name] = said[-500:]
            continue
        parameters[name] = json.loads(out.splitlines()[-1])["estimate"]["trainable_parameters"]
    return Measurement(len(failed), {"failed": failed, "trainable_parameters": parameters})
