"""The command line: assembles the command groups and turns errors into one line and an exit code."""

from __future__ import annotations

import sys

import typer

from .. import __version__
from ..store.errors import SleuthError
from . import (
    calibrate,
    capture,
    compare,
    demo,
    diagnose,
    imports,
    keep,
    knowledge,
    localize,
    logits,
    look,
    mapping,
    plot,
    port,
    replay,
)

app = typer.Typer(
    name="sleuth",
    help="Capture a model's tensors once, then find where its port diverges, and why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Usage errors of typer; the class has no public name of its own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _version(value: bool) -> None:
    if value:
        print(f"sleuth {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Capture a model's tensors once, then find where its port diverges, and why."""


demo.register(app)
capture.register(app)
imports.register(app)
compare.register(app)
mapping.register(app)
logits.register(app)
localize.register(app)
replay.register(app)
diagnose.register(app)
calibrate.register(app)
look.register(app)
keep.register(app)
plot.register(app)
port.register(app)
knowledge.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="sleuth", standalone_mode=False)
    except SleuthError as error:
        return _fail(str(error))
    except _UsageError as error:
        message = getattr(error, "format_message", error.__str__)()
        if not message:  # no arguments: the help has been printed
            return 2
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "sleuth"
        return _fail(f"{message.rstrip('.')}; see '{where} --help'")
    except typer.Abort:
        return 130
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    except ModuleNotFoundError as error:
        extra = "porting" if error.name == "jinja2" else "capture"
        return _fail(f"this command needs {error.name}; install it with: pip install 'tensorsleuth[{extra}]'")
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int = 2) -> int:
    line = " ".join(message.split())
    print(f"sleuth: {line}", file=sys.stderr)
    return code
