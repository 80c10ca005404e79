"""The lean step gives what the model's own modules give, and leaves alone whatever is more than it knows."""

from collections.abc import Callable
from pathlib import Path

import opd_rollout.torch_engine as torch_engine
import pytest
import torch
from opd_rollout.lean_decoding import decode_token
from opd_rollout.sampling import request_seed
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import Completion, GenerateRequest, ModuleWeights, Sampling
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import opd
from opd.build.system import watched
from tests.rollout.models import FAMILIES, SHAPE, llama, mistral, prompts, qwen3

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 16}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def qwen2() -> nn.Module:
    """Biases on queries, keys and values."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{name: value for name, value in SHAPE.items() if name != "head_dim"})).eval()


def shaken(model: nn.Module) -> nn.Module:
    """With norms and biases that are not ones and zeros, so that each of them shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def cut(model: nn.Module) -> nn.Module:
    model.config.num_hidden_layers = 2
    return model


def louder(model: nn.Module) -> nn.Module:
    for layer in model.get_decoder().layers:
        layer.self_attn.scaling *= 3
    return model


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "qwen3": qwen3,
    "qwen2": qwen2,
    "llama": llama,
    "one head each": lambda: llama(num_key_value_heads=4),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama3 positions": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "yarn positions": lambda: qwen3(rope_parameters=YARN_ROPE),
    "mistral": lambda: mistral(sliding_window=None),
    "a wide head": lambda: qwen3(head_dim=24, num_key_value_heads=1),
    "other constants": lambda: louder(llama(rms_norm_eps=0.5)),
    "two layers of three": lambda: cut(llama(num_hidden_layers=3)),
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each lean step."""
    seen: list[int] = []

    def counted(decoder, token, *rest):
        seen.append(len(token))
        return decode_token(decoder, token, *rest)

    monkeypatch.setattr(torch_engine, "decode_token", counted)
    return seen


def answers(model: nn.Module, temperature: float = 1.0, stop_ids: tuple[int, ...] = (3, 4)) -> list[Completion]:
    requests = [
        GenerateRequest(prompt_ids=text, seed=request_seed(0, str(index), sample, 0)) for index, text in enumerate(prompts(5)) for sample in range(3)
    ]
    sampling = Sampling(temperature=temperature, max_tokens=20, stop_ids=stop_ids)
    return TorchEngine(model, pad_id=0, token_budget=10_000).generate(requests, sampling)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", KNOWN)
def test_tokens_and_logprobs_are_those_of_the_modules(name: str, temperature: float, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(KNOWN[name]())
    lean = answers(model, temperature)
    assert name != "qwen3" or steps[-1] < 15, "rows that end are dropped on the way"
    monkeypatch.setattr(torch_engine, "lean_decoder", lambda model, num_positions: None)
    taken, modules = len(steps), answers(model, temperature)
    assert len(steps) == taken > 5
    assert [answer.token_ids for answer in lean] == [answer.token_ids for answer in modules]
    for one, other in zip(lean, modules, strict=True):
        assert torch.allclose(one.logprobs, other.logprobs, atol=2e-5)
    assert temperature == 0 or min(answer.logprobs.min().item() for answer in lean) < -1


def test_new_weights_are_read(steps: list[int]) -> None:
    model, trained = qwen3(), shaken(qwen3())
    engine = TorchEngine(model, pad_id=0, token_budget=10_000)
    before = answers(model)
    engine.load_weights(ModuleWeights(version=1, named=tuple(trained.named_parameters())))
    after = answers(model)
    assert [answer.token_ids for answer in after] == [answer.token_ids for answer in answers(trained)]
    assert [answer.token_ids for answer in after] != [answer.token_ids for answer in before] and steps


def adapted() -> nn.Module:
    return get_peft_model(qwen3(), LoraConfig(r=2, target_modules="all-linear"))


def hooked() -> nn.Module:
    model = qwen3()
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


def adapted_embeddings() -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))


def changed(change: Callable[[nn.Module], object], **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = llama(**options)
        change(model.get_decoder())
        return model

    return make


class Scaled(nn.Embedding):
    """An embedding that is more than its weight."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 4


class Halved(LlamaMLP):
    """A part of the family with a method of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


def replaced_forward(decoder: nn.Module) -> None:
    """As accelerate's hooks and in-place patches do."""
    mlp = decoder.layers[1].mlp
    mlp.forward = lambda x, forward=mlp.forward: forward(x) * 0.5


def eager() -> nn.Module:
    model = qwen3()
    model.config._attn_implementation = "eager"
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    **{name: make for name, make in FAMILIES.items() if name not in ("qwen3", "llama")},
    "adapters": adapted,
    "hooks": hooked,
    "adapters on embeddings alone": adapted_embeddings,
    "an embedding that scales": changed(lambda decoder: setattr(decoder.embed_tokens, "__class__", Scaled)),
    "embeddings kept short": changed(lambda decoder: setattr(decoder.embed_tokens, "max_norm", 0.5)),
    "a subclass": changed(lambda decoder: setattr(decoder.layers[0].mlp, "__class__", Halved)),
    "a replaced method": changed(replaced_forward),
    "another norm": changed(lambda decoder: setattr(decoder, "norm", nn.RMSNorm(32))),
    "a replaced activation": changed(lambda decoder: setattr(decoder.layers[0].mlp, "act_fn", nn.Tanh())),
    "norms in bf16": changed(lambda decoder: decoder.layers[0].input_layernorm.to(torch.bfloat16)),
    "angles that moved once": changed(lambda decoder: decoder.config.rope_parameters.update(rope_type="default"), rope_parameters=dict(DYNAMIC_ROPE)),
    "another attention": eager,
    "another activation": lambda: llama(hidden_act="gelu"),
    "angles that move": lambda: llama(rope_parameters=dict(DYNAMIC_ROPE)),
    "fp64": lambda: qwen3().double(),
    "bf16": lambda: qwen3().to(torch.bfloat16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_this_shape_keeps_to_its_modules(name: str, steps: list[int]) -> None:
    assert len(answers(OTHERS[name]())) == 15
    assert steps == []


def test_a_patched_class_and_hooks_of_every_module_keep_to_the_modules(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(LlamaMLP, "forward", lambda self, x, forward=LlamaMLP.forward: forward(self, x) * 0.5)
        answers(llama())
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        answers(llama())
    finally:
        handle.remove()
    assert steps == []
    answers(llama())
    assert steps


def test_autocast_keeps_to_the_modules(steps: list[int]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers(qwen3())
    assert steps == []


def test_what_only_watches_a_model_leaves_it_the_lean_step(steps: list[int]) -> None:
    """As every run's request to stop does, and the beats of an engine in a process of its own."""
    model, counter = qwen3(), iter(range(1000))
    watched(lambda prompt, text: None, {model}, lambda *_: next(counter))
    answers(model)
    assert len(steps) > 5 and next(counter) == 2 + 1 + len(steps)  # the head's check, the prompts, the tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_a_training_run_takes_the_lean_step(kind: str, steps: list[int], tmp_path: Path) -> None:
    settings = {"steps": 1, "rollout.prompts": 2, "group": 2, "sampling.max_tokens": 8, "eval.num_problems": 0, "eval.final_problems": 0}
    opd.train("recipes/runs/grpo_expr.yaml", {**settings, "learner.kind": kind, "track.wandb": "disabled"}, folder=tmp_path / "run")
    assert 0 < len(steps) <= 7
