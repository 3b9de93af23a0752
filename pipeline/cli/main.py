"""The command line, `kasa`: its commands, in the order in which help shows them, and how it ends.

Exit codes: 0 done; 2 the user's mistake, one clear error and no traceback; 1 failure, with the traceback in a file; 130 after
Ctrl-C and 143 after SIGTERM (`pipeline.core.stopping`).
Results go to stdout, everything else to stderr.

Command modules import what they run inside of the commands, so that each starts quickly and `kasa retrain` loads nothing
that it does not need to find nothing to do.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import tempfile
import traceback
import warnings

import typer
from rich.markup import escape

from kasa.errors import KasaError
from pipeline.cli import compare, models, run
from pipeline.core import stopping
from pipeline.core.console import console
from pipeline.core.errors import WorkspaceError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune LLaMA-class models with KaSA: Ray, DeepSpeed ZeRO, MLflow.",
)
app.command()(run.run)
app.command()(run.retrain)
app.command()(compare.compare)
app.command()(run.plan)
app.command()(compare.judge)
app.command()(run.recipes)
app.command()(run.submit)
app.command()(models.generate)
app.command()(models.export)
app.command("import")(models.import_)
app.command()(models.models)
app.command()(models.promote)
app.command()(models.rollback)
app.command()(run.doctor)
app.add_typer(models.artifacts_app, name="artifacts")


def main() -> None:
    """Run the command that the arguments name, and end as the exit codes say."""
    warnings.filterwarnings("ignore")
    with stopping.on_signals(sys.argv):
        _run()


def _run() -> None:
    try:
        app()
    except KasaError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            _fail(error)
        full = WorkspaceError(
            f"{error.filename or 'the workspace'} cannot be written: {error.strerror}; free some space and run again"
        )
        console.print(f"[bold red]error:[/] {escape(str(full))}", soft_wrap=True)
        sys.exit(2)
    except Exception as error:
        _fail(error)
    finally:
        # Else the interpreter's last garbage collection goes through all that torch and Ray have imported: 2 to 3 s.
        gc.freeze()


def _fail(error: Exception) -> None:
    with tempfile.NamedTemporaryFile("w", prefix="kasa-failure-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    console.print(f"[bold red]failed:[/] {type(error).__name__}: {escape(first)}", soft_wrap=True)
    console.print(f"the traceback is in {file.name}; the same command resumes from here", soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
