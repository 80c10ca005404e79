"""The command line: one positional, dotted overrides, no flags."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from opd.config.choices import nearest
from opd.config.load import KINDS, describe, find_recipe, kind_of, parse_overrides, refuse_method
from opd.config.stages import read_stages
from opd.errors import NotReproduced, Paused, Preempted, RunFailed, TooManySkipped
from opd.help import PAGES, USAGE, version
from opd.launcher.driver import refuse_other_launchers, train_stages, wants_launcher
from opd.overview import overview


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit status 2 for a mistake in the input, 1 for a run that failed, 3 for one that a guard rail paused, 130 for
    Ctrl-C, 0 otherwise.

    A run that was stopped by SIGTERM or SIGUSR1 is no failure: its state is saved, and the status is 0.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    asks = not words or words[0] in HELP or (words[0] in COMMANDS and any(word in HELP for word in words[1:]))
    topic = next((word for word in words if word not in HELP), "")
    if asks and (not topic or topic in PAGES):
        print(PAGES[topic] if topic else USAGE, end="")
        return 0
    words = [topic] if asks else words  # what there is no help for is no command
    if words[0] in ("version", "-V", "--version"):
        print(version())
        return 0
    if words[0] not in COMMANDS:
        close = nearest(words[0], COMMANDS)
        print(f"opd: no command {words[0]!r}{close}; commands: {', '.join(COMMANDS)}. `opd help` shows examples.", file=sys.stderr)
        return 2
    try:
        COMMANDS[words[0]](words[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `opd show | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        print(f"opd: {error}", file=sys.stderr)
        return 2
    except Paused as paused:
        print(f"opd: paused by {paused}. The state is saved: look (opd inspect), then the same command goes on", file=sys.stderr)
        return 3
    except Preempted as stopped:
        print(f"opd: {stopped}: everything up to the last whole step is saved; run the same command to go on", file=sys.stderr)
        return 130 if "Ctrl-C" in str(stopped) else 0
    except (TooManySkipped, NotReproduced, RunFailed) as failed:
        print(f"opd: {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("opd: interrupted; the last checkpoint stays, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def _train(words: Sequence[str]) -> None:
    name, overrides = _name(words, "train RECIPE"), parse_overrides(words[1:])
    refuse_method(name, overrides)
    refuse_other_launchers()
    stages = read_stages(name, overrides)
    launched = any(wants_launcher(stage) for stage in stages)
    folder = train_stages(stages, name) if launched else import_module("opd.api").train(name, overrides)
    print(import_module("opd.run.ending").summary(folder))


def _check(words: Sequence[str]) -> None:
    name, changes = _name(words, "check RECIPE"), parse_overrides(words[1:])
    of_arms = kind_of(name) == KINDS["compare"]
    check = import_module("opd.preflight.arms").check_comparison if of_arms else import_module("opd.preflight.report").check
    if not check(name, changes):
        raise ValueError("this recipe would not run as it is: see the errors above")


def _compare(words: Sequence[str]) -> None:
    import_module("opd.reports").compare(_name(words, "compare COMPARISON"), parse_overrides(words[1:]))


def _eval(words: Sequence[str]) -> None:
    import_module("opd.examination.run").evaluate(_name(words, "eval MODEL_OR_RUN"), parse_overrides(words[1:]))


def _inspect(words: Sequence[str]) -> None:
    print(import_module("opd.reports").inspect(_name(words, "inspect RUN"), parse_overrides(words[1:])))


def _diff(words: Sequence[str]) -> None:
    if len(words) != 2 or any("=" in word for word in words):
        raise ValueError(f"opd diff takes two run folders, opd diff RUN_A RUN_B; found {' '.join(words) or 'none'}")
    difference = import_module("opd.comparison.difference")
    print(difference.describe(difference.diff_runs(Path(words[0]), Path(words[1]))))


def _ledger(words: Sequence[str]) -> None:
    print(import_module("opd.timing.ledger").ledger(_name(words, "ledger RUN"), parse_overrides(words[1:])))


def _import(words: Sequence[str]) -> None:
    if len(words) < 2 or any("=" in word for word in words[:2]):
        raise ValueError("opd import takes a kind and a source: opd import trl FOLDER name=NAME, or opd import wandb FILE name=NAME")
    print(f"run folder: {import_module('opd.comparison.imported').import_run(words[0], words[1], parse_overrides(words[2:]))}")


def _doctor(words: Sequence[str]) -> None:
    print(import_module("opd.timing.doctor").doctor(_name(words, "doctor RUN"), parse_overrides(words[1:])))


def _diagnose(words: Sequence[str]) -> None:
    print(import_module("opd.diagnosis.run").diagnose_and_report(_name(words, "diagnose RECIPE"), parse_overrides(words[1:])))


def _bundle(words: Sequence[str]) -> None:
    print(import_module("opd.replaying.replay").bundle(_name(words, "bundle RUN step=N"), parse_overrides(words[1:])))


def _replay(words: Sequence[str]) -> None:
    print(import_module("opd.replaying.replay").replay_and_report(_name(words, "replay BUNDLE"), parse_overrides(words[1:])))


def _simulate(words: Sequence[str]) -> None:
    simulator = import_module("opd.timing.simulate")
    print(simulator.describe(simulator.simulate(_name(words, "simulate RUN"), words[1:])))


def _score(words: Sequence[str]) -> None:
    print(import_module("opd.scoring").score(_name(words, "score RECIPE"), parse_overrides(words[1:])))


def _publish(words: Sequence[str]) -> None:
    print(import_module("opd.publishing").publish(_name(words, "publish RUN"), parse_overrides(words[1:])))


def _show(words: Sequence[str]) -> None:
    if not words:
        print(overview())
        return
    path = find_recipe(words[0])
    for recipe in read_stages(words[0], words[1:]):
        print(f"# {path}{' for ' + recipe.name if recipe.name else ''} with every default filled in\n{describe(recipe)}", end="")


def _name(words: Sequence[str], form: str) -> str:
    if words and words[0].startswith("-"):
        parse_overrides(words)  # raises: there are no flags
    if not words or "=" in words[0]:
        raise ValueError(f"a name is missing: opd {form} [key=value ...]; `opd show` lists what there is")
    return words[0]


HELP = ("help", "-h", "--help")
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "check": _check,
    "compare": _compare,
    "eval": _eval,
    "inspect": _inspect,
    "diff": _diff,
    "ledger": _ledger,
    "import": _import,
    "doctor": _doctor,
    "diagnose": _diagnose,
    "bundle": _bundle,
    "replay": _replay,
    "simulate": _simulate,
    "score": _score,
    "publish": _publish,
    "show": _show,
}

if __name__ == "__main__":
    sys.exit(main())
