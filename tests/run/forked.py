"""Runs of `opd` in processes of their own, forked from one that has imported everything once, with a fault at a chosen place.

The forkserver never starts a thread or a process group, so forking it is sound.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

import opd.api  # noqa: E402
import opd.learner.deepspeed_learner  # noqa: E402
import opd.run.live  # noqa: E402
import opd.run.training  # noqa: E402
from opd.cli import main  # noqa: E402

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
TINY = {
    "model": {"shape": SHAPE},
    "data": {"task": "expr"},
    "rollout": {"prompts": 2},
    "sampling": {"max_tokens": 8},
    "eval": {"every": 0, "num_problems": 0, "final_problems": 0},
    "learner": {"kind": "torch"},
    "track": {"wandb": "disabled"},
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """At the `visit`-th entry (from 1) of a phase in this process: send this process a signal at its "start", "middle" (checkpoint) or "end"."""

    phase: str
    visit: int
    number: signal.Signals = signal.SIGKILL
    where: str = "end"


def recipe_file(folder: Path, **keys) -> str:
    """A recipe over TINY, mapping by mapping."""
    merged = {**TINY, **{key: {**TINY[key], **value} if isinstance(TINY.get(key), dict) else value for key, value in keys.items()}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged))
    return str(path)


def opd_process(folder: Path, *words: str, fault: Fault | None = None, timeout: float = 600.0) -> tuple[int, str]:
    """(exit status, stderr) of `opd WORDS` in `folder`."""
    process = CONTEXT.Process(target=_run, args=(str(folder), words, fault))
    process.start()
    process.join(timeout)
    assert process.exitcode is not None, "the run did not end"
    return process.exitcode, (folder / "stderr").read_text()


def _run(folder: str, words: tuple[str, ...], fault: Fault | None) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if fault is not None:
        install(fault)
    status = main(words)
    Path("modules").write_text(" ".join(sys.modules))
    sys.exit(status)


def install(fault: Fault) -> None:
    """Put the fault into the clock that times every phase, or between the files of a checkpoint."""
    original, visits = opd.run.live.PhaseClock.__call__, dict.fromkeys([fault.phase], 0)

    def strike() -> None:
        if visits[fault.phase] == fault.visit:
            os.kill(os.getpid(), fault.number)

    @contextmanager
    def faulty(clock, phase):
        with original(clock, phase):
            if phase == fault.phase:
                visits[phase] += 1
                if fault.where == "start":
                    strike()
            yield
            if phase == fault.phase and fault.where == "end":
                strike()

    opd.run.live.PhaseClock.__call__ = faulty
    if fault.where == "middle":
        write = opd.run.training.write_json

        def broken(path, content):
            strike()
            write(path, content)

        opd.run.training.write_json = broken


def coin(prompt, text):
    """A verifier that draws from every global generator: a resume that loses one of them gives other rewards."""
    return float(random.random() + np.random.random() + torch.rand(()).item() > 1.5)


def never(prompt, text):
    """A verifier that hangs."""
    threading.Event().wait(600)


def of_the_text(prompt, text):
    """A verifier that reads the text alone, so that it may run beside the learner, which draws from no generator either."""
    return float(sum(text.encode()) % 3 == 0)
