"""The one exception that carries a sentence for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can mend: the message says what was wrong, with the value, and what to do.

    Scripts print the message alone and exit with status 2; anything else keeps its stack trace.
    """
