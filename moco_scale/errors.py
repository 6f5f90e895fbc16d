"""The exceptions a user is meant to see."""

import socket


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with status 2.
    """


class StoppedEarly(Exception):
    """A run that was asked to stop has saved its state; says why and where."""


class RankError(UserError):
    """A user's error that one rank alone met, such as a picture only it reads."""

    def __init__(self, error: UserError, rank: int) -> None:
        super().__init__(f"rank {rank} on {socket.gethostname()}: {error}")
