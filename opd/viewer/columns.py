"""The learner's own numbers for the answers that a samples file shows: every token's loss, ratio and tail mass, as the update saw them."""

from collections.abc import Mapping

from torch import Tensor

from opd.types import MicroBatch

SHOWN = ("loss/", "ratio/", "tail_mass/")


def spread(total: int, count: int) -> list[int]:
    """Up to `count` places, evenly spread over `total`."""
    return [n * total // count for n in range(count)] if total > count else list(range(total))


class ShownColumns:
    """Implements opd.learner.types.Observer: keeps [T] columns of the answers that will be shown, of the step's first pass over them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._wanted: set[int] = set()
        self._found: dict[int, dict[str, Tensor]] = {}

    def begin(self, num_samples: int) -> None:
        self._wanted, self._found = set(spread(num_samples, self._count)), {}

    def take(self, first: int, batch: MicroBatch, columns: Mapping[str, Tensor]) -> None:
        for sequence, member in enumerate(batch.members):
            place = first + member
            if place in self._wanted and place not in self._found:
                rows = batch.rows.sequence == sequence
                self._found[place] = {name: column[rows].cpu() for name, column in columns.items() if name.startswith(SHOWN)}

    def of(self, place: int) -> Mapping[str, Tensor]:
        """Name -> [T] of the sample at that place of the last step; {} where the learner did not see it."""
        return self._found.get(place, {})
