"""One learner rank under the launcher: joins the others, trains, reports how it ended."""

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from opd.api import train_rank
from opd.build.system import check_tracking
from opd.config.recipe import Recipe
from opd.errors import Paused, Preempted, RunFailed, TooManySkipped
from opd.launcher.beacon import Beacon
from opd.launcher.ranks import is_lost_peer, join_ranks
from opd.run.live import LiveView, PhaseClock
from opd.stop import StopRequest, stop_signals

SLACK = 1.5  # torch's own deadline comes after the launcher's, which can say who stalled


class RankReports:
    """An opd.run.live.Reports that tells the launcher."""

    def __init__(self, beacon: Beacon) -> None:
        self._beacon, self._step = beacon, 0
        self._read: dict[str, Callable[[], Mapping[str, Any]]] = {}

    def phase(self, phase: str) -> None:
        self._beacon.tell(phase=phase, step=self._step)

    def tick(self) -> None:
        self._beacon.tick(lambda: {name: dict(read()) for name, read in self._read.items()})

    def step(self, step: int) -> None:
        self._step = step
        self._beacon.tell(step=step)

    @property
    def coming(self) -> int:
        return self._step + 1

    def facts(self, **facts: Any) -> None:
        self._beacon.tell(**facts)

    def watch(self, name: str, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read[name] = read

    def write(self, state: str, why: str = "") -> None: ...  # the launcher writes the state, from the outcome


def run(beacon: Beacon) -> int:
    """The whole life of a rank; its exit status matters less than the outcome that it tells the launcher."""
    faulthandler.register(signal.SIGUSR2)  # the launcher asks a stalled rank for its stack
    kind, text = _outcome(beacon)
    beacon.tell(outcome=[kind, text])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if kind in ("finished", "preempted", "paused") else 1)  # a process group whose peers are gone may not end by itself


def _outcome(beacon: Beacon) -> tuple[str, str]:
    try:
        return "finished", _train(beacon)
    except Preempted as stopped:
        return "paused" if isinstance(stopped, Paused) else "preempted", str(stopped)
    except TooManySkipped as failed:
        return "skipped", str(failed)
    except RunFailed as failed:
        return "failed", str(failed)
    except KeyboardInterrupt:
        return "interrupted", ""
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return "input", str(error)
    except Exception as error:
        if is_lost_peer(error):
            return "lost", f"{type(error).__name__}: {error}"
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"


def _train(beacon: Beacon) -> str:
    order = beacon.order
    recipe, rank, count = Recipe.model_validate(order["recipe"]), order["rank"], order["count"]
    torch.set_num_threads(max(1, order["threads"]))
    stop = StopRequest(at_once=True)
    with stop_signals(stop):
        beacon.tell(phase="join")
        if rank == 0:
            check_tracking(recipe.track.wandb)
        backend = "nccl" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "gloo"
        deadline = recipe.launch.deadline_seconds * SLACK
        threads = 2 if recipe.asynchrony.max_staleness else 1
        ranks = join_ranks(order["rendezvous"], rank, count, deadline, beacon.waiting, backend=backend, threads=threads)
        beacon.tell(phase="build")
        view = LiveView(Path(order["folder"]).name, recipe.steps, quiet=order["quiet"] or rank > 0, roles=lambda: beacon.shown)
        with contextlib.closing(view):
            return train_rank(Path(order["folder"]), recipe, PhaseClock(RankReports(beacon), stop, ranks), view, actors=order["actors"])
