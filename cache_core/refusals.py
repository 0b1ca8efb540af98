"""Why a call of the model cannot be served from the cache: raised inside it, and answered by computing the call in full."""


class UnsupportedCallError(Exception):
    """A block was called in a way that a replay or a skip does not know: compute this call in full instead."""


class UnsteadyError(UnsupportedCallError):
    """Tokens do not lie where they lay before: what is kept of one evaluation is no use in another."""


class UnknownInputError(UnsupportedCallError):
    """What the model was given cannot be told from what it added before its blocks."""
