"""The one exception that entry points show to users as a plain sentence."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is a sentence that says what to do next.

    Entry points (`train.py`, `infer.py`) print it without a traceback and exit with status 2; every other
    exception is a defect of this project and keeps its traceback.
    """
