"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Something outside the code is wrong: a path, a file, a field, a flag.

    Its message is one sentence that says what is wrong, where, and the way out; the entry points
    print it without a traceback and exit with status 2.
    """
