"""The one exception that is meant for the person at the keyboard."""


class DcrisError(Exception):
    """Bad input, said in one plain sentence: what is wrong, where, and what to do about it.

    The command line prints the sentence and exits with 2; it never shows a traceback for this class. Anything else that
    escapes is a defect of dcris and keeps its traceback.
    """


def out_of_memory(error: Exception) -> bool:
    """Whether Python, torch or a GPU had no memory left. torch has a class of its own for GPUs alone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)
