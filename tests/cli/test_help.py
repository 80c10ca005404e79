"""Help for every command, and sentences for what newcomers type."""

import json
import re

import pytest

from opd import __version__
from opd.cli import COMMANDS, main
from opd.config.load import find_recipe, load_recipe, read_yaml
from opd.help import PAGES


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", ["{} --help", "{} -h", "help {}", "{} opsd_expr steps=3 --help"])
def test_every_command_has_a_page_with_usage_and_an_example(command, form, capfd):
    assert main(form.format(command).split()) == 0
    said = capfd.readouterr()
    assert said.err == "" and said.out == PAGES[command]
    assert said.out.startswith(f"usage: opd {command} ") and f"\nexample: opd {command} " in said.out


def test_keys_in_the_pages_of_train_and_check_exist():
    keys = PAGES["train"].partition("Often changed:")[2].partition("example")[0].replace("'{rank: 8}'", "{rank:8}")
    found = re.findall(r"([a-z_.]+)=([^\s;]+)", keys)
    assert len(found) > 15
    for key, value in found:
        load_recipe("opsd_expr", [f"{key}={value.replace('FOLDER', 'x').replace('FILE.jsonl', '').replace('{rank:8}', '{rank: 8}')}"])


def test_version_names_version_and_commit(capfd):
    assert main(["--version"]) == 0
    assert re.fullmatch(rf"opd {re.escape(__version__)}( \(commit [0-9a-f]{{12}}\))?\n", capfd.readouterr().out)


CASES = [
    ("help trian", ["no command 'trian'", "'train'"]),
    ("train opsd_expr lr=1e-4", ["unknown key 'lr' (did you mean 'optimizer.lr'?)"]),
    ("train opsd_expr optimizer.learning_rate=1", ["'optimizer.learning_rate' (did you mean 'optimizer.lr'?)"]),
    ("train opsd_expr batch_size=1", ["(did you mean 'rollout.prompts'?)"]),
    ("train opsd_expr epochs=1", ["(did you mean 'steps'?)"]),
    ("train opsd_expr max_new_tokens=1", ["(did you mean 'sampling.max_tokens'?)"]),
    ("train opsd_expr eval.temperature=1", ["(did you mean 'eval.temperatures'?)"]),
    ("train opsd_expr num_generations=1", ["(did you mean 'group'?)"]),
    ("train opsd_expr kl_coef=1", ["kl_coef: ", "reference_kl", "grpo_kl"]),
    ("train opsd_expr weight_decay=1", ["(did you mean 'optimizer.weight_decay'?)"]),
    ("train opsd_expr temprature=1", ["did you mean", "'sampling.temperature'"]),
    ("train opsd_expr --steps 5", ["write steps=5"]),
    ("train opsd_expr --steps=5", ["write steps=5"]),
    ("train --steps 5 opsd_expr", ["write steps=5"]),
    ("train opsd_expr model.lora=true", ["model.lora: must be a mapping of keys, e.g. {rank: 8} (found True)"]),
    ("train opsd_expr model.shape=null", ["model.shape: must be a mapping, {key: value} (found None)"]),
    ("train opsd_expr model.dtype=fp16", ["model.dtype: must be one of 'float32' or 'bfloat16' (found 'fp16')"]),
    ("train opsd_expr steps=many", ["steps: must be a whole number (found 'many')"]),
    ("train recipes/compare/demo.yaml", ["comparison of several runs: use opd compare recipes/compare/demo.yaml"]),
    ("compare recipes/runs/opsd_expr.yaml", ["use opd train recipes/runs/opsd_expr.yaml (or opd check"]),
    ("compare opsd_expr", ["use opd train opsd_expr"]),
    ("compare grpo", ["grpo is a method, not a comparison"]),
    ("compare recipes/methods/opsd.yaml", ["opsd.yaml is a method, not a comparison: `opd show` lists"]),
    ("compare recipes/hardware/gpu1.yaml", ["gpu1.yaml is a hardware file, not a comparison"]),
    ("diagnose opsd", ["opsd is a method, not a run: start from opsd_expr"]),
    ("diagnose demo", ["demo is a comparison of several runs: use opd compare demo"]),
    ("diagnose sft_opsd_expr", ["sft_opsd_expr holds several runs (stages)", "opd train, check and show"]),
    ("score opsd", ["opsd is a method, not a run"]),
    ("train gpu1", ["gpu1 is a hardware file: add it to a recipe with hardware=gpu1"]),
    ("train recipes/hardware/gpu1.yaml", ["is a hardware file: add it to a recipe with hardware=gpu1"]),
    ("train models/expr-base", ["models/expr-base is a model's folder, not a recipe", "model.path=models/expr-base"]),
    ("inspect opsd_expr", ["opsd_expr is a recipe, and a run folder is wanted: opd train opsd_expr makes one"]),
    ("eval demo", ["demo is a comparison, and a run folder is wanted: opd compare demo makes runs"]),
    ("ledger grpo", ["grpo is a method, and a run folder is wanted: name a run that used it"]),
    ("diff opsd_expr grpo_expr", ["opsd_expr is a recipe, and a run folder is wanted"]),
    ("publish models/expr-base", ["models/expr-base is no run folder"]),
    ("replay recipes/methods/opsd.yaml", ["opsd.yaml is no bundle: opd bundle RUN step=N writes one"]),
    ("train opsd", ["opsd is a method, not a run: start from opsd_expr", "model.path=FOLDER"]),
    ("check paced", ["paced is a method, not a run: start from a run (`opd show` lists them)"]),
]


@pytest.mark.parametrize(("words", "expected"), CASES, ids=[words for words, _ in CASES])
def test_what_newcomers_type_is_answered_with_the_fix(words, expected, monkeypatch, request, capfd):
    monkeypatch.chdir(request.config.rootpath)
    assert main(words.split()) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "Input should" not in said.err
    assert all(part in said.err for part in expected), said.err


def test_the_valid_keys_of_a_place_are_listed_once_and_known_runs_are_runs(capfd):
    assert main(["train", "opsd_expr", "lr=1", "epochs=1", "zzz=1"]) == 2
    assert capfd.readouterr().err.count("valid: ") == 1
    assert main(["train", "qqqqqq"]) == 2
    known = capfd.readouterr().err.partition("known runs: ")[2].strip().split(", ")
    assert "opsd_expr" in known and "opsd" not in known and "demo" not in known


def test_a_record_of_a_run_is_its_recipe_again(tmp_path):
    recipe = load_recipe("opsd_expr", {"steps": 7, "name": "a"})
    path = tmp_path / "resolved.json"
    path.write_text(json.dumps({"schema_version": 1, "recipe": recipe.model_dump(mode="json"), "git_commit": "0"}))
    assert load_recipe(str(path)) == recipe and load_recipe(str(path), ["name=b"]).name == "b"
    with pytest.raises(ValueError, match="is the record of a run"):
        load_recipe(str(path), ["method=grpo"])
    assert "recipe" not in read_yaml(find_recipe("opsd_expr"))
