"""The exception for errors in the user's input, and helpers for its messages."""


class InputError(ValueError):
    """An error in the user's input: a path, a file, a prompt, a setting.

    The message is one line that names the input, what was expected and what to do. The command line prints it on stderr
    and exits with status 2; any other exception is a bug and keeps its traceback.
    """


class OutOfStep(InputError):
    """An error of one of several processes, which must exit at once: a normal exit would wait for the others."""


def one_line(error: BaseException) -> str:
    """The first line of another library's error message, at most 160 characters."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return first if len(first) <= 160 else first[:160] + "..."


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8; command-line arguments whose bytes are not UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def utf8(text: str) -> str:
    """`text` with each byte that is not UTF-8, such as in a path, escaped like ``\\udce9``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def listed(names: list[str], limit: int = 8) -> str:
    """The first `limit` of `names`, comma-separated, and "..." if there are more."""
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:limit])
    return shown + (", ..." if len(names) > limit else "")
