"""The one error that a user can put right."""


class InputError(ValueError):
    """Something the user gave is wrong: a path, a file, a prompt, a setting.

    The message is one line that names the input, says what was expected and what to do. The command line prints it
    on stderr and exits with status 2; everything else is a fault of ours and keeps its traceback.
    """


class OutOfStep(InputError):
    """An error of one process of several, which must end at once: in JAX's own way it would wait for the others."""


def one_line(error: BaseException) -> str:
    """First line of another library's message, short."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return first if len(first) <= 160 else first[:160] + "..."


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: the argument of a command line need not be, if its bytes are not."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def utf8(text: str) -> str:
    """`text`, with an escape such as ``\\udce9`` for each byte of a path that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def listed(names: list[str], limit: int = 8) -> str:
    """The first `limit` of `names`, and a sign of more."""
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:limit])
    return shown + (", ..." if len(names) > limit else "")
