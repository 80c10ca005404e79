"""What the simulator predicts from runs with one engine process, against runs with two and with answers ahead of the learner.

python benchmarks/simulator.py                # -> benchmarks/results/simulator.json, and a table; about 3 minutes on 2 cores
"""

import argparse
import json
import os
import statistics
from pathlib import Path

from asynchrony import RECIPE, ROOT, facts, run, step_seconds

from opd.timing.simulate import WARM_UP, Layout, calibrate, fixed_share_of, predict

PROMPTS = 32  # of RECIPE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/simulator.json")
    options = parser.parse_args()
    os.chdir(ROOT)
    kinds = {  # changes to the recipe; cores of the engine processes, the learner is on core 0
        "1 actor": ({}, [1]),
        "1 actor, half the prompts": ({"rollout.prompts": PROMPTS // 2}, [1]),
        "2 actors": ({"engine.replicas": 2}, [0, 1]),
        "1 actor, max_staleness 1": ({"asynchrony.max_staleness": 1}, [1]),
    }
    measured: dict[str, list[list[dict]]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, (changes, cores) in kinds.items():
            measured[name].append(run(changes, options.steps, cores))
    base = [row for rows in measured["1 actor"] for row in rows]
    half = [row for rows in measured["1 actor, half the prompts"] for row in rows]
    share = fixed_share_of([{}] * WARM_UP + base, [{}] * WARM_UP + half, 0.5)
    costs = calibrate([{}] * WARM_UP + base, fixed_share=share)
    layouts = {"1 actor": Layout(), "2 actors": Layout(replicas=2), "1 actor, max_staleness 1": Layout(max_staleness=1)}
    table = {}
    for name, layout in layouts.items():
        steps = [step_seconds(rows) for rows in measured[name]]
        middle, predicted = statistics.median(steps), predict(costs, layout)
        error = predicted.step / middle - 1
        table[name] = {"measured": steps, "median": middle, "predicted": predicted.step, "error": error, "idle": dict(predicted.idle)}
        print(
            f"{name}: measured {1000 * middle:.0f} ms a step (median of {len(steps)}, {1000 * min(steps):.0f} to {1000 * max(steps):.0f}), predicted "
            f"{1000 * predicted.step:.0f} ms, {100 * error:+.0f} %"
        )
    print(f"{100 * share:.0f} % of a rollout's time is not shared by replicas")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**facts(), "recipe": RECIPE, "fixed_share": share, "seconds": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
