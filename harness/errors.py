"""The one error type that is meant for the user."""


class UserError(ValueError):
    """What the user got wrong, where, and the way out, in one line. The command line prints it and exits with 2."""
