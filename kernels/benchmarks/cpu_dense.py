"""CPU table: JSD between two heads over the whole vocabulary, forward and backward, fp32. TRL's function takes over a minute a pass here."""

from dataclasses import replace

from harness import Sizes, main
from systems import dense_task

FULL = (Sizes(tokens=512, columns=32_000, hidden_size=512), Sizes(tokens=256, columns=151_936, hidden_size=512))
QUICK = (Sizes(tokens=48, columns=700, hidden_size=32, chosen=8),)

if __name__ == "__main__":
    task = dense_task(gpu=False)
    task = replace(task, systems={name: system for name, system in task.systems.items() if not name.startswith("trl")})
    main("cpu_dense", task, FULL, QUICK, __file__)
