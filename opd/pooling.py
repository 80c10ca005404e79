"""The one place through which statistics over a whole batch go.

A function that compares an answer's tokens with those of the batch (a mean, a quantile, a largest value) is handed a `pool` and computes
its statistic on what comes back. With one process that is what it put in; with several it is every rank's values, joined in rank order,
so that results do not depend on how a batch is split. Pooling is collective: such a function is called on every rank, also on one whose
answers it does not concern, and pools the same number of times there.
"""

from collections.abc import Callable

from torch import Tensor

Pool = Callable[[Tensor], Tensor]
"""[n] -> [n over all ranks], of one dtype; n may differ between ranks and be 0."""


def alone(values: Tensor) -> Tensor:
    """The pool of a single process."""
    return values
