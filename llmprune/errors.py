"""The one exception that a user can cause."""


class InputError(ValueError):
    """A rule that the user's input broke: the rule, what was got, and what to do, in one line.

    The command line prints the message and exits with code 2; nothing has been half-written when
    it is raised.
    """
