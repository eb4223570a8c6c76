"""The one error that is the user's to fix."""


class UserError(Exception):
    """Bad usage or input. The message is one line that says what to change; the CLI exits with code 2."""
