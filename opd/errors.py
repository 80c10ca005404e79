"""The two ways in which a run ends early without anybody having made a mistake in the input."""


class Preempted(Exception):
    """Somebody asked the run to stop; raised only where nothing is lost."""


class TooManySkipped(Exception):
    """Updates were refused several times in a row; the last good checkpoint stays."""
