"""The `flashvaed` program: its commands in pipeline order, its version, and how it fails."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from flashvaed_cli import __version__
from flashvaed_cli.cli.commands import COMMANDS, run
from flashvaed_cli.cli.help import GroupedProgram
from flashvaed_cli.cli.interruption import interruption, signals_raise
from flashvaed_cli.cli.running import ARGV_KEY, DONE_KEY, SIGNALS_KEY
from flashvaed_cli.cli.spelling import suggestions
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.printable import printable

HELP = "Turn the decoder of a video VAE into a fast drop-in decoder for the same latents."
EPILOG = (
    "Every command works without arguments in an empty folder, on the embedded builtin:tiny-wan. "
    "The whole pipeline: flashvaed analyze && flashvaed prune --ratio 0.25 && flashvaed convert-ops && "
    "flashvaed distill && flashvaed eval && flashvaed export\n\n"
    "Exit codes: 0 success; 1 finished, but a condition of --require failed; 2 an error that the message explains; "
    "130 interrupted, 143 terminated, 129 terminal closed."
)


# What the user can do about an OSError; every other one is a bug.
_FULL = "Free the space, or choose another place with --output"
_CLOSED = "Check its permissions, or choose another place with --output"
_GONE = "Was it moved or removed in the meantime? Check the path, and run again"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _CLOSED),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE), _GONE),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "Give another path"),
    **dict.fromkeys((errno.EIO, errno.ENXIO), "The disk or the network does not respond: check it, and run again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit (ulimit -n), or give fewer files"),
    errno.ENOMEM: "Give the program more memory, or smaller clips",
}


class _Program(GroupedProgram):
    """Remembers what was typed, and turns a mistake that the user can fix into one message."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        argv = list(args)
        if args[:1] == ["help"]:  # as in git and others
            args = [*args[1:2], "--help"]
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[ARGV_KEY] = argv
        return context

    def invoke(self, ctx: Any) -> Any:
        try:
            with signals_raise() as ctx.meta[SIGNALS_KEY], _interrupts_told(ctx):
                return super().invoke(ctx)
        except FlashVaedError as error:
            from flashvaed_cli.cli.console import print_error

            if not error.is_told_elsewhere:
                print_error(str(error))
                _print_document(ctx, str(error), error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.errno not in _ADVICE:
                raise
            from flashvaed_cli.cli.console import print_error

            place = f"{error.filename}: " if error.filename else ""
            message = f"{place}{error.strerror}. {_ADVICE[error.errno]}."
            print_error(message)
            _print_document(ctx, message, FlashVaedError.exit_code)
            raise typer.Exit(FlashVaedError.exit_code) from error
        except Exception as error:
            if isinstance(flag := getattr(error, "option_name", None), str) and hasattr(error, "possibilities"):
                command = getattr(getattr(error, "ctx", None), "command", None)
                known = [name for parameter in getattr(command, "params", ()) for name in parameter.opts]
                error.possibilities = suggestions(flag, known)  # type: ignore[attr-defined]
            if callable(describe := getattr(error, "format_message", None)):  # an unknown flag or command
                _print_document(ctx, str(describe()), FlashVaedError.exit_code)
            raise


def _print_document(ctx: Any, message: str, exit_code: int) -> None:
    """Under `--json`, an error as the only JSON document on standard output; nothing if the result is already there."""
    if "--json" not in ctx.meta.get(ARGV_KEY, ()) or ctx.meta.get(DONE_KEY):
        return
    document = {"kind": "flashvaed-error", "schema": 1, "message": printable(message), "exit_code": exit_code}
    with contextlib.suppress(OSError):
        typer.echo(json.dumps(document, indent=2))


@contextmanager
def _interrupts_told(ctx: Any) -> Iterator[None]:
    """Report interruptions outside a stage: while a command loads what it needs, or prints its result."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = ctx.meta.get(DONE_KEY, False)
        raise interruption(error, "all was written" if done else "nothing was written") from error


_BOXES_NEED_COLUMNS = 100  # in narrower terminals rich cuts off the names of long flags

app = typer.Typer(
    name="flashvaed",
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= _BOXES_NEED_COLUMNS else None,
    cls=_Program,
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"flashvaed {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


for _command in COMMANDS:
    _command.add_to(app)
run.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; never returns normally."""
    app(args=None if arguments is None else list(arguments), prog_name="flashvaed")
