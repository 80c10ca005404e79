"""The two ways in which a run ends early without anybody having made a mistake in the input."""


class Preempted(KeyboardInterrupt):
    """Somebody asked the run to stop; raised only where nothing is lost. Not an Exception: no verifier or worker may swallow it."""


class TooManySkipped(Exception):
    """Updates were refused several times in a row; the last good checkpoint stays."""
