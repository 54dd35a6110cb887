"""The exception for errors that a user can correct, and warnings."""


class DcrisError(Exception):
    """Bad input or a limit of the machine, in one or two sentences: what is wrong, where, and what
    to do.

    The command line prints the message without a traceback and exits with code 2. Any other
    exception that reaches it is a bug in dcris and keeps its traceback.
    """


class DcrisWarning(UserWarning):
    """Something that a user should know, in one sentence. The command line prints it as a line."""


class LongPhraseWarning(DcrisWarning):
    """A phrase is longer than a model reads, so its end does not change the prediction."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: Exception) -> bool:
    """Return whether an error of Python or torch means that memory ran out. torch has a class of
    its own for GPUs only."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)
