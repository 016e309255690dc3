"""What the user can fix: the command line prints the message in one line and exits with 2."""


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""


class Locked(UserError):
    """Another process is training in the folder."""


class Diverged(UserError):
    """Loss, gradient or weights became NaN or infinite."""
