"""From a command line to an exit code.

A command is a frozen dataclass with a `run` method, in a module of its own that imports jax inside `run` only: help and
`info` answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Protocol

# Command -> (module, class). The first line of the class's docstring stands in `dsv4 --help`.
COMMANDS = {
    "info": ("dsv4.cli.info", "Info"),
    "generate": ("dsv4.cli.generate", "Generate"),
    "logits": ("dsv4.cli.logits", "Logits"),
    "import": ("dsv4.cli.import_checkpoint", "Import"),
    "export": ("dsv4.cli.export_checkpoint", "Export"),
    "quantize": ("dsv4.cli.quantize", "Quantize"),
    "train": ("dsv4.cli.train", "Train"),
    "evaluate": ("dsv4.cli.evaluate", "Evaluate"),
    "doctor": ("dsv4.cli.doctor", "Doctor"),
}
DESCRIPTION = """A readable, exact, trainable DeepSeek-V4 in JAX.

examples:
  dsv4 info flash
  dsv4 generate "In the beginning" --temperature 0.8
  dsv4 train tiny --set train.steps=200 --out runs/tiny
  dsv4 logits CHECKPOINT --input-ids ids.npy --output logits.npy

the same everywhere:
  CONFIG         a name, a Python file, a config.json, or a checkpoint directory
  --set A.B=C    changes one field of the config; give it as often as you like
  --json FILE    also writes the results as JSON, whole or not at all
  stdout         results; progress, warnings and errors go to stderr
  exit code      0; 2 for what stands on the command line (an unknown option, CONFIG or field, a value out of range);
                 1 for all else (files, checkpoints, prompts that do not fit), with one line that says why
  DSV4_DEBUG=1   shows the traceback behind an error"""
# Errors that are the user's to fix: their message is all there is to say. A module that was never imported has raised
# nothing, so none is imported for this.
USER_ERRORS = {
    "dsv4.config.errors": "ConfigError",
    "dsv4.checkpoint.errors": "CheckpointError",
    "dsv4.decoding.inputs": "InputError",
    "dsv4.training.errors": "DataError",
    "pallas_kernels.dispatch": "UnsupportedError",
    "pallas_kernels.formats": "FormatError",
}


class UsageError(Exception):
    """Arguments that the parser takes and the command cannot: a value out of range, two that contradict each other."""


class Command(Protocol):
    def run(self) -> None: ...


def run(argv: Sequence[str] | None = None) -> int:
    """Parses and runs; see `dsv4.cli.main`."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = _parse(list(argv))
    except SystemExit as stop:  # tyro's way out: 0 after help, 2 for what cannot be parsed
        return int(stop.code or 0)
    with _warnings_in_one_line():
        try:
            command.run()
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BrokenPipeError:  # the reader of stdout (`| head`) has gone: nothing more to say, nor at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if os.environ.get("DSV4_DEBUG") == "1" or not isinstance(error, (UsageError, *_user_errors())):
                raise
            return _fail(str(error) or type(error).__name__, 2 if isinstance(error, UsageError) else 1)
    return 0


def _parse(argv: list[str]) -> Command:
    try:
        import tyro
    except ModuleNotFoundError as error:  # many images lack it, and the library does not need it
        print(f"dsv4: error: the command line needs {error.name}: pip install {error.name}", file=sys.stderr)
        raise SystemExit(1) from None
    if argv and argv[0] in COMMANDS:
        return tyro.cli(_load(argv[0]), prog=f"dsv4 {argv[0]}", args=argv[1:])
    if argv == ["--version"]:
        from dsv4 import __version__

        print(__version__)
        raise SystemExit(0)
    choices = (
        Annotated[command := _load(name), tyro.conf.subcommand(name, description=_first_line(command))]
        for name in COMMANDS
    )
    either: Any = functools.reduce(operator.or_, choices)
    return tyro.cli(either, prog="dsv4", description=DESCRIPTION, args=argv)


def _load(name: str) -> type[Command]:
    module, kind = COMMANDS[name]
    return getattr(importlib.import_module(module), kind)


def _first_line(command: type[Command]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


def _user_errors() -> tuple[type[Exception], ...]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in USER_ERRORS.items())
    return (OSError, FloatingPointError, *(error for error in found if error is not None))


def _fail(message: str, code: int = 1) -> int:
    print(f"dsv4: error: {one_line(message)}", file=sys.stderr)
    return code


def one_line(message: str) -> str:
    """A message of several lines as one: a list below its heading becomes `heading: item; item`."""
    head, *rest = (line.strip() for line in message.strip().splitlines() if line.strip())
    joined = head
    for line in rest:
        joined += (" " if joined.endswith(":") else "; ") + line
    return joined


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Warnings are for the user too: no file name, no source line. Each is shown once."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: print(  # type: ignore[assignment]
            f"dsv4: warning: {one_line(str(message))}", file=sys.stderr
        )
        yield
