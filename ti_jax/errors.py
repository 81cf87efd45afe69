"""The one error that a user can put right."""


class InputError(ValueError):
    """Something the user gave is wrong: a path, a file, a prompt, a setting.

    The message is one line that names the input, says what was expected and what to do. The command line prints it
    on stderr and exits with status 2; everything else is a fault of ours and keeps its traceback.
    """


class OutOfStep(InputError):
    """An error of one process of several, which must end at once: in JAX's own way it would wait for the others."""
