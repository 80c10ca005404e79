"""The shipped bases are ignorant, not sloppy: wrong under greedy decoding too, right when a hint tells them what they lack."""

from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from opd_rollout.sampling import request_seed
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, Sampling
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.tasks import TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.tasks.types import with_hint
from opd.text import chat
from opd.types import Prompt

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = [name for name, task in TASKS.items() if task.characters]  # the base of task words is made by its recipe
FOLDERS = [f"{task}-{role}" for task in SHIPPED for role in ("base", "teacher")]


@cache
def load(folder: str) -> tuple[TorchEngine, chat.Tokenizer]:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODELS / folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / folder)
    return TorchEngine(model, pad_id=tokenizer.pad_token_id, token_budget=16384), tokenizer


def problems(task: str, number: int = 512) -> list[Prompt]:
    return list(islice(TASKS[task].prompts("test", 0, "standard"), number))


def accuracy(
    folder: str, prompts: list[Prompt], kind: str = "", *, temperature: float = 1.0, samples: int = 1, hints_of: list[Prompt] | None = None
) -> torch.Tensor:
    """Right answers [P, samples] as 0 or 1; `hints_of` other prompts' hints are shown."""
    engine, tokenizer = load(folder)
    verify = TASKS[folder.split("-")[0]].verify
    requests = []
    for prompt, shown in zip(prompts, hints_of or prompts, strict=True):
        content = with_hint(kind, shown.hints.get(kind, ""), prompt.messages[0]["content"])
        ids = chat.render(tokenizer, ({"role": "user", "content": content},))
        requests += [GenerateRequest(prompt_ids=ids, seed=request_seed(0, prompt.id, sample, 0)) for sample in range(samples)]
    completions = engine.generate(requests, Sampling(temperature=temperature, max_tokens=40, stop_ids=(tokenizer.eos_token_id,)))
    right = [
        completion.finish == "stop" and verify(prompts[index // samples], chat.decode(tokenizer, completion.token_ids)).correct
        for index, completion in enumerate(completions)
    ]
    return torch.tensor(right, dtype=torch.float64).view(len(prompts), samples)


@pytest.mark.parametrize("task", SHIPPED)
def test_base_solves_some_alone_and_nearly_all_with_the_facts(task):
    base, prompts = f"{task}-base", problems(task)
    alone = float(accuracy(base, prompts).mean())
    greedy = float(accuracy(base, prompts, temperature=0.0).mean())
    told = float(accuracy(base, prompts, "facts").mean())
    misled = float(accuracy(base, prompts, "facts", hints_of=prompts[1:] + prompts[:1]).mean())
    assert 0.2 <= alone <= 0.7
    assert 0.2 <= greedy <= 0.85
    assert told >= 0.85
    assert misled <= alone + 0.03


@pytest.mark.parametrize("task", SHIPPED)
def test_base_finds_right_answers_among_sixteen(task):
    right = accuracy(f"{task}-base", problems(task, 128), samples=16)
    assert float(right.amax(1).mean()) >= float(right.mean()) + 0.15


@pytest.mark.parametrize("task", SHIPPED)
def test_base_reads_the_other_hints(task):
    base, prompts = f"{task}-base", problems(task, 256)
    alone = float(accuracy(base, prompts).mean())
    assert float(accuracy(base, prompts, "solution").mean()) >= 0.9
    assert float(accuracy(base, prompts, "answer").mean()) >= alone + 0.05


@pytest.mark.parametrize("task", SHIPPED)
def test_feedback_helps_the_base(task):
    base, prompts = f"{task}-base", problems(task, 256)
    verify = TASKS[task].verify
    failed = [prompt for prompt, right in zip(prompts, accuracy(base, prompts, temperature=0.0)[:, 0].tolist(), strict=True) if not right]
    told = [
        Prompt(id=p.id, messages=p.messages, answer=p.answer, hints={"feedback": verify(p, greedy_text(base, p)).feedback}) for p in failed
    ]
    assert len(told) >= 40
    assert float(accuracy(base, told, "feedback").mean()) >= float(accuracy(base, told).mean()) + 0.1


def greedy_text(folder: str, prompt: Prompt) -> str:
    engine, tokenizer = load(folder)
    request = GenerateRequest(prompt_ids=chat.render(tokenizer, prompt.messages), seed=0)
    [completion] = engine.generate([request], Sampling(temperature=0.0, max_tokens=40, stop_ids=(tokenizer.eos_token_id,)))
    return chat.decode(tokenizer, completion.token_ids)


@pytest.mark.parametrize("task", SHIPPED)
def test_teacher_needs_no_hint(task):
    assert float(accuracy(f"{task}-teacher", problems(task)).mean()) >= 0.93


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_a_plain_small_model_with_its_tasks_tokenizer(folder):
    files = sorted(path.name for path in (MODELS / folder).iterdir())
    assert sum((MODELS / folder / name).stat().st_size for name in files) <= 4_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    engine, tokenizer = load(folder)
    made = character_tokenizer(TASKS[folder.split("-")[0]].characters)
    assert tokenizer.get_vocab() == made.get_vocab()
    assert tokenizer.chat_template == made.chat_template
    assert chat.stop_ids(tokenizer, engine.model.generation_config) == (made.eos_token_id,)
    assert len(chat.assistant_prefix(tokenizer)) == 1
    assert engine.model.config.model_type == "qwen3"
    assert engine.model.config.vocab_size == len(tokenizer)
    assert all(parameter.dtype == torch.float32 for parameter in engine.model.parameters())
