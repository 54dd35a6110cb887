"""The one exception that is meant for the person at the keyboard."""


class DcrisError(Exception):
    """Bad input, said in one plain sentence: what is wrong, where, and what to do about it.

    The command line prints the sentence and exits with 2; it never shows a traceback for this class. Anything else that
    escapes is a defect of dcris and keeps its traceback.
    """
