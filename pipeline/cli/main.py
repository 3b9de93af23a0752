"""The command line, `kasa`: its commands, in the order in which help shows them, and how it ends.

Exit codes: 0 done; 2 the user's mistake, one clear error and no traceback; 1 failure, with the traceback in a file; 130 after
Ctrl-C and 143 after SIGTERM (`pipeline.core.stopping`).
Results go to stdout, everything else to stderr.

Command modules import what they run inside of the commands, so that each starts quickly and `kasa retrain` loads nothing
that it does not need to find nothing to do.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import traceback
import warnings
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from kasa.errors import KasaError
from pipeline.cli import compare, models, plan, run
from pipeline.core import stopping
from pipeline.core.code import package_versions
from pipeline.core.console import console
from pipeline.core.errors import mendable
from pipeline.core.redaction import redacted


def _print_version(asked: bool) -> None:
    if asked:
        print(f"kasa {package_versions(['kasa-pipeline'])['kasa-pipeline']}")
        raise typer.Exit


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(run.run)
app.command()(run.retrain)
app.command()(compare.compare)
app.command()(plan.plan)
app.command()(compare.judge)
app.command()(plan.recipes)
app.command()(run.submit)
app.command()(models.generate)
app.command()(models.serve)
app.command()(models.export)
app.command("import")(models.import_)
app.command()(models.models)
app.command()(models.promote)
app.command()(models.rollback)
app.command()(run.doctor)
app.add_typer(models.artifacts_app, name="artifacts")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune LLaMA-class models with KaSA: Ray, DeepSpeed ZeRO, MLflow."""


def main() -> None:
    """Run the command that the arguments name, and end as the exit codes say."""
    warnings.filterwarnings("ignore")
    with stopping.on_signals(sys.argv):
        _run()


def _run() -> None:
    try:
        app()
    except KasaError as error:
        _refuse(error)
    except Exception as error:
        if (known := mendable(error)) is not None:
            _refuse(known)
        _fail(error)
    finally:
        # Else the interpreter's last garbage collection goes through all that torch and Ray have imported: 2 to 3 s.
        gc.freeze()


def _refuse(error: KasaError) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    sys.exit(2)


def _fail(error: Exception) -> NoReturn:
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    console.print(f"[bold red]failed:[/] {type(error).__name__}: {escape(first)}", soft_wrap=True)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="kasa-failure-", suffix=".txt", delete=False) as file:
            file.write(redacted("".join(traceback.format_exception(error))))
        console.print(f"the traceback is in {file.name}; the same command resumes from here", soft_wrap=True)
    except OSError as full:
        console.print(f"the traceback cannot be written ({full}); the same command resumes from here", soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
