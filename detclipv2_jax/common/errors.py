"""The exception for every error that the user can fix."""


class UserError(ValueError):
    """An error outside the code: a path, a file, a config field or a flag is wrong.

    The message says what is wrong, where, and how to fix it, in one or two sentences. Commands
    print it without a traceback and exit with status 2.
    """
