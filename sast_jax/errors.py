"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in a config, a command, a data set or a run folder.

    Its message says what is wrong, what was found, what is allowed and where to change it; the command line prints it
    without a traceback and exits with status 2.
    """


def refuse(problems: list[str], heading: str = "") -> None:
    """Raises one `UserError` that lists all problems, one a line; returns if there are none."""
    if problems:
        lines = [heading] if heading else []
        raise UserError("\n".join(lines + [f"  {problem}" if heading else problem for problem in problems]))
