"""The one exception type that a user's mistake raises."""


class UserError(ValueError):
    """Something the caller can put right: what came, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """
