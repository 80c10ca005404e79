"""What ends a command without anybody having made a mistake in the input."""


class Preempted(KeyboardInterrupt):
    """Somebody asked the run to stop; raised only where nothing is lost. Not an Exception: no verifier or worker may swallow it."""


class Paused(Preempted):
    """A guard rail asked for a look; the state is saved, and the same command goes on."""


class TooManySkipped(Exception):
    """Updates were refused several times in a row; the last good checkpoint stays."""


class NotReproduced(Exception):
    """A replay of a recorded step gave other bits than the record."""


class RunFailed(Exception):
    """A process of the run failed, and the launcher could not go on from the last checkpoint; the message says which, where and why."""


class VerifierStuck(ValueError):
    """A function of one's own gave no verdict in time: the run ends, for what it holds or was changing is not known."""


class Unreachable(ValueError):
    """A data set of the hub that cannot be read here."""
