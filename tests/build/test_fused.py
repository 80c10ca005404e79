"""model.liger: refused where it cannot be, and Liger's layers in the place of the model's own where it can. No kernel of Liger runs here."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from opd.build import fused
from opd.build.fused import ARGUMENTS, check_fused, patches
from opd.build.student import load_model
from opd.config.load import load_recipe, parse_recipe
from opd.preflight.report import examine

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
FAMILIES = (Qwen3Config(**SIZES, head_dim=16), LlamaConfig(**SIZES), Gemma3TextConfig(**SIZES, head_dim=16))


def test_without_a_gpu_it_is_refused_before_weights_are_made():
    with pytest.raises(ValueError, match="Triton kernels, which need a GPU, and here is none: run on a GPU, or leave model.liger out"):
        load_model(parse_recipe({"model": {"liger": True, "shape": {"hidden_size": 32}}}), None)
    found, _ = examine(load_recipe("opsd_expr", {"model.liger": True}))
    assert found[0].severity == "error" and found[0].sentence.startswith("model.liger: Liger's layers are Triton kernels")
    assert not [one for one in examine(load_recipe("opsd_expr", {"model.liger": True, "target.device": "h100"}))[0] if "liger" in one.sentence]


def test_a_missing_package_and_an_unknown_family_name_the_fix(monkeypatch):
    monkeypatch.setattr(fused, "compute_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(fused, "patches", lambda: {"qwen3": None})
    with pytest.raises(ValueError, match="no layers for the type 'gpt2': leave model.liger out .it knows qwen3"):
        check_fused("gpt2")
    check_fused("qwen3")
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs liger-kernel, which is not installed: pip install .opd-train\[gpu\]."):
        check_fused("qwen3")
    with pytest.raises(ValueError, match="did you mean 'model.liger'"):
        parse_recipe({}, {"use_liger_kernel": True})


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_liger_patches_layers_and_leaves_head_and_weights(config, monkeypatch):
    """In Liger's own modules alone: its functions also replace names in transformers, which are put back."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is an extra")
    model = AutoModelForCausalLM.from_config(config)
    module = __import__(type(model).__module__, fromlist=["x"])
    for name in list(vars(module)):
        monkeypatch.setattr(module, name, getattr(module, name))  # undone after the test
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward = type(model).forward
    patches()[config.model_type](model=model, **ARGUMENTS)
    assert "iger" in repr(model.model.norm.forward.__func__) + repr(model.model.layers[0].mlp.forward.__func__)
    assert type(model).forward is forward and "forward" not in vars(model), "the model's own forward, and with it the head, is left alone"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
