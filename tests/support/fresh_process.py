"""Run by path in a process of its own: load a registered model as a stranger would, with nothing of this checkout at hand.

`python -P fresh_process.py URI REQUEST.json OUT`: REQUEST has `prompts` and `sequences` (token ids). OUT becomes a folder with
`answer.json` (the answers, and which files of our packages were run: the model's own, and others) and `logits.safetensors`.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Load, answer, and write down what came out."""
    uri, request_file, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    import mlflow
    import torch
    from safetensors.torch import save_file

    request = json.loads(request_file.read_text(encoding="utf-8"))
    loaded = mlflow.pyfunc.load_model(uri)
    answers = list(loaded.predict(request["prompts"]))
    model = loaded.unwrap_python_model().served.model
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids])).logits.float().clone() for ids in request["sequences"]]
    out.mkdir()
    save_file({str(index): one for index, one in enumerate(logits)}, out / "logits.safetensors")
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("kasa", "pipeline")]
    files = sorted(Path(str(module.__file__)) for module in ours if getattr(module, "__file__", None))
    own = [str(file) for file in files if _is_beside_a_model(file)]
    strange = [str(file) for file in files if not _is_beside_a_model(file)]
    (out / "answer.json").write_text(json.dumps({"answers": answers, "own": own, "strange": strange}), encoding="utf-8")


def _is_beside_a_model(file: Path) -> bool:
    return any(folder.name == "code" and (folder.parent / "MLmodel").is_file() for folder in file.parents)


if __name__ == "__main__":
    main()
