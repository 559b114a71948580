"""The front door that both command lines share: subcommands from functions, errors as one sentence, exit codes.

Exit code 0 means done, 1 that a check found what it was looking for (such as an invalid file), 2 that the input cannot
be used as given: the message on stderr is one sentence and nothing was half-written. Ctrl-C ends with 130, and output
that nobody reads on (``| head``) with 141, quietly, as the shell's own commands do. Warnings are a line each, without
the place in the code. Any other exception is a defect of ours and keeps its traceback.
"""

__all__ = ["given_command", "plain_warnings", "run_cli"]

import contextvars
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from difficulty.errors import InputError

_given: contextvars.ContextVar[str | None] = contextvars.ContextVar("given_command", default=None)


def given_command() -> str | None:
    """The command line that is being carried out, as one would type it; None if the packages are used from Python."""
    return _given.get()


def run_cli(
    subcommands: dict[str, Callable[..., Any]], prog: str, description: str, args: Sequence[str] | None = None
) -> int:
    """Parse the command line, call the function it names, and return the exit code.

    Args:
        subcommands: name to function; its signature and docstring become the options and the help.
        prog: name of the command in the help.
        description: one sentence under the usage line.
        args: arguments instead of ``sys.argv[1:]``.

    Returns:
        What the function returns if that is an int, else 0; 2 for an ``InputError``, 130 for Ctrl-C, 141 if stdout was
        closed.
    """
    import tyro

    before = plain_warnings()
    token = _given.set(shlex.join([prog, *(sys.argv[1:] if args is None else args)]))
    try:
        try:
            result = tyro.extras.subcommand_cli_from_dict(subcommands, prog=prog, description=description, args=args)
        finally:
            sys.stdout.flush()  # what is still buffered would fail at exit, where nothing can catch it
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 141
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun one is enough to say it
            print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; what was finished is on disk, the same command continues or repeats it",
              file=sys.stderr)
        return 130
    finally:
        _given.reset(token)
        warnings.formatwarning = before
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def plain_warnings() -> Callable[..., str]:
    """Let warnings be written as one line for the user; returns how they were written before."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **more: f"warning: {message}\n"
    return before


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that was closed, and no other pipe; what is left for it is then thrown away."""
    try:
        print(flush=True)  # what failed before may be gone from the buffer, which could be flushed without an error
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
