"""How the user is told: a mistake to mend, an interruption, or what merely looks wrong."""

import sys
import warnings

from sast_jax.text import printable_lines


class UserError(ValueError):
    """A mistake in a config, a command, a data set or a run folder.

    Its message says what is wrong, what was found, what is allowed and where to change it; the command line prints it
    without a traceback and exits with status 2.
    """


class Diverged(UserError):
    """A number of a training run is not finite any more."""


def refuse(problems: list[str], heading: str = "") -> None:
    """Raises one `UserError` that lists all problems, one a line; returns if there are none."""
    if problems:
        lines = [heading] if heading else []
        raise UserError("\n".join(lines + [f"  {problem}" if heading else problem for problem in problems]))


class Interrupted(Exception):
    """Training stopped on request; a checkpoint of that moment is on disk."""


class SuspicionWarning(UserWarning):
    """Training goes on, but something about it looks wrong; the message says what, and what to do."""


def warn(message: str) -> None:
    """Issues a `SuspicionWarning`; equal messages are shown once by default."""
    warnings.warn(message, SuspicionWarning, stacklevel=3)


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Takes the place of `warnings.showwarning`: one line for a `SuspicionWarning`, the usual ones for others."""
    is_own = issubclass(category, SuspicionWarning)
    own = f"sast-jax: warning: {printable_lines(str(message))}\n"
    sys.stderr.write(own if is_own else warnings.formatwarning(message, category, filename, lineno, line))
