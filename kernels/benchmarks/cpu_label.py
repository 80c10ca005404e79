"""CPU table: cross-entropy of one label a token, forward and backward, fp32. At V = 151,936 TRL's function takes over a minute a pass."""

from harness import Sizes, main
from systems import label_task

FULL = (Sizes(tokens=512, columns=32_000, hidden_size=512),)
QUICK = (Sizes(tokens=48, columns=700, hidden_size=32, chosen=8),)

if __name__ == "__main__":
    main("cpu_label", label_task(gpu=False), FULL, QUICK, __file__)
