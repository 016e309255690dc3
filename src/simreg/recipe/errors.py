"""The one exception that means "the user can fix this": the CLI prints it and exits with 2."""


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""
