"""The one error that is the user's to fix, and the exit code of a check that did not hold."""


class UserError(Exception):
    """Bad usage or input. The message is one line that says what to change; the CLI exits with code 2."""


# What the CLI answers with one line and exit code 2: also paths that the user may not read or write.
MISTAKES = (UserError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)

GATE_FAILED = 1  # exit code of a verb whose check did not hold
