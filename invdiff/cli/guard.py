"""From exceptions to one sentence and an exit code.

Bad input: 2. Interrupted: 130. A fault of the program: 1. Nothing of it on standard output.
"""

from __future__ import annotations

import functools
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer

from invdiff.errors import InvdiffError

#: Whether ``invdiff --debug`` was given; set anew on every start.
debugging = False

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Interrupted(Exception):
    """The user stopped the program; the message says how to go on."""


def guarded(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn what a command raises into one sentence on standard error and an exit code."""

    @functools.wraps(command)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, SystemExit):
            raise
        except BaseException as error:
            if debugging or kwargs.get("debug"):
                traceback.print_exc()
            code, sentence = _explain(error)
            say(sentence)
            raise typer.Exit(code) from None

    return run


def say(sentence: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the sentence for an exception."""
    text = " ".join(str(error).split())
    if isinstance(error, InvdiffError):
        return 2, f"Error: {text}"
    if isinstance(error, Interrupted):
        return 130, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "Interrupted; nothing was written."
    if isinstance(error, MemoryError):
        return 2, "Error: There is not enough memory; use a smaller --batch, fewer draws, or a smaller image."
    if isinstance(error, OSError) and error.filename:
        return 2, f"Error: {error.filename} cannot be used ({error.strerror}); check the path and its permissions."
    fault = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return 1, f"Error: This is a fault of the program ({fault[:300]}); run again with --debug and report it."


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if getattr(category, "__module__", "") == "builtins":
        say(f"Warning: {' '.join(str(message).split())}")
