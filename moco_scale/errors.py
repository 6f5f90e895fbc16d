"""The one exception a user is meant to see."""


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with status 2.
    """
