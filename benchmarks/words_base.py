"""What a base of task words can do: its accuracy on the test split alone and under each kind of hint.

python benchmarks/words_base.py runs/base_words/model [DIFFICULTY] [NUMBER]     # writes benchmarks/results/words_base_words.json

Ends with status 1 where the base is no base for a comparison: greedy accuracy alone outside of 20 to 85 %, or sampled under the facts below 85 %.
"""

import json
import os
import sys
from datetime import date
from itertools import islice
from pathlib import Path

import torch
from opd_rollout.sampling import request_seed
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, Sampling
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.tasks import TASKS
from opd.tasks.types import with_hint
from opd.text import chat

RESULTS = Path("benchmarks/results")
WORDS = TASKS["words"]
HINTS = {"facts": "facts", "solution": "solution", "quantities": "quantities", "answer": "answer", "fact": "feedback"}  # hint -> its template


def main(folder: str, difficulty: str = "standard", number: str = "512") -> None:
    """One row a kind of hint; every row at temperature 1 and greedy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = TorchEngine(model, pad_id=tokenizer.pad_token_id, token_budget=16384)
    prompts = list(islice(WORDS.prompts("test", 0, difficulty), int(number)))

    def accuracy(hint: str, temperature: float) -> float:
        shown = [with_hint(HINTS.get(hint, ""), prompt.hints.get(hint, ""), prompt.messages[0]["content"], WORDS.templates) for prompt in prompts]
        contexts = [chat.render(tokenizer, ({"role": "user", "content": text},)) for text in shown]
        requests = [
            GenerateRequest(prompt_ids=ids, seed=request_seed(0, prompt.id, 0, 0)) for ids, prompt in zip(contexts, prompts, strict=True)
        ]
        sampling = Sampling(temperature=temperature, max_tokens=64, stop_ids=(tokenizer.eos_token_id,))
        answers = [chat.decode(tokenizer, completion.token_ids) for completion in engine.generate(requests, sampling)]
        right = [WORDS.verify(prompt, answer).correct for prompt, answer in zip(prompts, answers, strict=True)]
        return round(sum(right) / len(right), 4)

    rows = {hint or "alone": {"sampled": accuracy(hint, 1.0), "greedy": accuracy(hint, 0.0)} for hint in ("", *HINTS)}
    found = {
        "command": " ".join(["python benchmarks/words_base.py", folder, difficulty, number]), "date": str(date.today()),
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores, no GPU",
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "vocabulary": len(tokenizer), "accuracy": rows,
    }  # fmt: skip
    (RESULTS / f"words_{Path(folder).resolve().parent.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    alone, told = rows["alone"]["greedy"], rows["facts"]["sampled"]
    if not 0.2 <= alone <= 0.85 or told < 0.85:
        sys.exit(f"no base for a comparison: greedy {alone:.0%} alone (20 to 85), {told:.0%} with the facts (85 and more); see docs/cookbook")


if __name__ == "__main__":
    main(*sys.argv[1:])
