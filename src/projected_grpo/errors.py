"""The one error that is the user's to fix, and what exit codes mean (2 is such an error)."""


class UserError(Exception):
    """Bad usage or input. The message is one line that says what to change; the CLI exits with code 2."""


# What the CLI answers with one line and exit code 2: also paths that the user may not read or write.
MISTAKES = (UserError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)

GATE_FAILED = 1  # exit code of a verb whose check did not hold
DIVERGED = 3  # of a run that the tripwire or gradients that are not finite ended
UNSAVED = 4  # of a run whose last save or results the storage did not take
SIGNALLED = 128  # plus the signal's number: stopped after a step and saved (SIGINT 130, SIGTERM 143)
