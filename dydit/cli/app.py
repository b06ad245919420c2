"""The ``dydit`` command: its verbs, and how mistakes are told.

Imports no torch: a verb imports what it needs when it runs, so that ``dydit --help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

import dydit
from dydit.cli.bench import bench
from dydit.cli.convert_checkpoint import convert_checkpoint
from dydit.cli.encode import encode
from dydit.cli.export import export
from dydit.cli.finetune import finetune
from dydit.cli.macs import macs
from dydit.cli.pretrain import pretrain
from dydit.cli.quickstart import quickstart
from dydit.cli.report import report
from dydit.cli.sample import sample
from dydit.errors import DyditError

MISTAKE = 2
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended
TERMINATED = 143  # that SIGTERM ended

# The base of what typer raises for wrong arguments; typer exports only classes derived from it, and
# newer releases no longer take it from the click package.
_UsageMistake: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # Plain help and tracebacks: rich would take as long to import as everything else together.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_EXAMPLES: dict[Callable[..., None], str] = {
    quickstart: "dydit quickstart --steps 200 --ratio 0.5",
    pretrain: "dydit pretrain configs/digits_pretrain.yaml train.lr=1e-3",
    finetune: "dydit finetune configs/digits.yaml output_dir=runs/a train.lr=2e-5",
    encode: "dydit encode images --vae stabilityai/sd-vae-ft-mse --out latents --flip",
    export: "dydit export runs/digits --steps 50 --out exports/digits",
    sample: "dydit sample runs/digits --labels 0,1,2 --num 12 --out samples",
    macs: "dydit macs DiT-XL/2 --sample-size 32",
    bench: "dydit bench DiT-XL/2 --batch 2,8 --dtype fp32,bf16 --rounds 9 --out bench",
    convert_checkpoint: "dydit convert-checkpoint DiT-XL-2-256x256.pt DiT-XL-2-256",
    report: "dydit report quickstart",
}
for _verb, _example in _EXAMPLES.items():
    app.command(epilog=f"Example: {_example}")(_verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dydit {dydit.__version__}")
        raise typer.Exit()


@app.callback(epilog="Example: dydit quickstart")
def dydit_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")
    ] = False,
) -> None:
    """Make a pretrained Diffusion Transformer dynamic, run it sliced, and report compute against quality."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    0 done, 2 a mistake told in one line, 130 interrupted, 143 ended by SIGTERM.

    Args:
        arguments: without the program's name; None: those of the process. ``--debug`` among them, before
            the verb or after it, lets errors through with their traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        with warnings.catch_warnings(), _sigterm_raised():
            if not (debug or sys.warnoptions):
                # Other libraries' notes to their developers; nothing a user of a verb could act on.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            status = app(words, prog_name="dydit", standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except (_UsageMistake, DyditError, OSError) as mistake:
        if debug and not isinstance(mistake, _UsageMistake):
            raise
        _tell(_one_line(mistake))
        return MISTAKE
    except (MemoryError, RuntimeError) as error:
        if debug or not _is_lack_of_memory(error):
            raise
        _tell("out of memory; make the batch smaller, or see --help for what else takes less")
        return MISTAKE
    # typer itself turns Ctrl-C into this status, without a word.
    if status == INTERRUPTED:
        _tell("interrupted")
    return status if isinstance(status, int) else 0


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """SIGTERM as an exception, so that what is half-written is removed; training has a way of its own."""

    def end(*_: Any) -> None:
        raise SystemExit(TERMINATED)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_lack_of_memory(error: Exception) -> bool:
    """Also torch's, of which that for the CPU has no class of its own; without importing torch."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _tell(text: str) -> None:
    typer.echo(f"error: {text}", err=True)


def _one_line(mistake: Any) -> str:
    if not isinstance(mistake, _UsageMistake):
        return " ".join(str(mistake).split())
    text = " ".join(mistake.format_message().replace("Value error, ", "").split()).rstrip(".")
    return f"{text}; see {mistake.ctx.command_path if mistake.ctx else 'dydit'} --help"
