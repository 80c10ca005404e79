"""Every mistake in the input: exit status 2, one sentence with the fix on stderr, no traceback, and nothing created or lost."""

import json
import os
import re
import shutil

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from opd.build.pretrained import new_config
from opd.cli import main
from opd.tasks import TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.text.bpe import train_byte_bpe

torch.set_num_threads(1)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
TINY = {
    "method": "opsd",
    "model": {"shape": SHAPE},
    "data": {"task": "expr"},
    "rollout": {"prompts": 2},
    "sampling": {"max_tokens": 8},
    "steps": 2,
    "eval": {"every": 0, "num_problems": 2, "final_problems": 2, "final_samples": 2},
    "learner": {"kind": "torch"},
    "track": {"wandb": "disabled"},
}
GOOD = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(12)]



def save_model(folder, tokenizer, **shape):
    AutoModelForCausalLM.from_config(new_config({**SHAPE, **shape}, tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model folders: good ones and every kind of broken one."""
    root = tmp_path_factory.mktemp("models")
    characters = character_tokenizer(TASKS["expr"].characters)
    good = save_model(root / "good", characters)
    save_model(root / "few_rows", characters, vocab_size=10)
    save_model(root / "other_tokens", train_byte_bpe(["some text"], 300))
    for name in ("no_weights", "broken_weights", "missing_weights", "no_tokenizer", "bad_config"):
        shutil.copytree(good, root / name)
    (root / "no_weights/model.safetensors").unlink()
    (root / "broken_weights/model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:1000])
    config = json.loads((good / "config.json").read_text())
    (root / "missing_weights/config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}))
    (root / "bad_config/config.json").write_text("{")
    for path in (root / "no_tokenizer").glob("*token*"):
        path.unlink()
    return root


@pytest.fixture
def workplace(tmp_path, monkeypatch, models):
    """A working directory with a good recipe, data files and model folders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(models)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "broken.yaml").write_text("steps: 2\nmodel: {path: [\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    lines = [json.dumps(record) for record in GOOD]
    files = {
        "good": lines,
        "malformed": [*lines[:2], '{"question": "1+1", "answer": ', *lines[3:]],
        "empty": [],
        "no_question": [lines[0], json.dumps({"task": "1+1?", "answer": "2"})],
        "no_answer": [lines[0], lines[1], json.dumps({"question": "1+1?"})],
        "null_answer": [json.dumps({"question": "1+1?", "answer": None})],
        "wrong_type": [lines[0], json.dumps({"question": 3.5, "answer": "2"})],
        "a_list": ["[1, 2]"],
        "twice": [lines[0], lines[1], lines[0]],
        "no_gold": [lines[0], json.dumps({"question": "Who?", "answer": "#### \\frac{"})],
        "no_solution": [json.dumps({"question": f"{n}+1?", "answer": str(n + 1)}) for n in range(12)],
        "one": lines[:1],
        "long": [*lines, json.dumps({"question": "why " * 2000, "answer": "#### 1"})],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in content))
    (tmp_path / "latin.jsonl").write_bytes('{"question": "né", "answer": "1"}\n'.encode("latin-1"))
    (tmp_path / "a_folder").mkdir()
    return tmp_path


def data(name, **more):
    return "data=" + json.dumps({"path": f"{name}.jsonl", **more})


CASES = [
    # the command line
    ("trian tiny.yaml", ["no command 'trian'", "train"]),
    ("train", ["a name is missing", "opd train RECIPE"]),
    ("train tiny.yam", ["no recipe 'tiny.yam'"]),
    ("train a_folder", ["no recipe 'a_folder'"]),
    ("train broken.yaml", ["broken.yaml: not valid YAML", "line 3"]),
    ("train binary.yaml", ["binary.yaml: not valid YAML"]),
    ("train good.jsonl", ["good.jsonl: not valid YAML"]),
    ("train tiny.yaml steps", ["'steps' is not an override", "key=value"]),
    ("train tiny.yaml optimizer.lr=[1", ["'optimizer.lr=[1'", "not valid YAML"]),
    ("eval", ["a name is missing"]),
    ("eval nowhere", ["nowhere is no run folder", "data.task=expr"]),
    ("eval nowhere data.task=expr", ["'nowhere'", "no such folder here"]),
    ("eval models/nowhere data.task=expr", ["no model folder 'models/nowhere'"]),
    ("inspect nowhere", ["neither nowhere nor runs/nowhere exists", "opd train RECIPE makes one"]),
    ("compare nowhere.yaml", ["nowhere.yaml"]),
    ("show grpoo", ["no recipe 'grpoo' (did you mean 'grpo'?)"]),
    # keys, methods, types
    ("train tiny.yaml optimzer.lr=1", ["unknown key 'optimzer' (did you mean 'optimizer'?)"]),
    ("train tiny.yaml optimizer.lrr=1", ["unknown key 'optimizer.lrr' (did you mean 'optimizer.lr'?)"]),
    ("train tiny.yaml method=grpoo", ["no recipe 'grpoo' (did you mean 'grpo'?)"]),
    ("train tiny.yaml optimizer.lr=fast", ["optimizer.lr", "must be a number", "'fast'"]),
    ("train tiny.yaml optimizer.lr=.nan", ["optimizer.lr"]),
    ("train tiny.yaml optimizer.lr=.inf", ["optimizer.lr"]),
    ("train tiny.yaml steps=0", ["steps: must be above 0"]),
    ("train tiny.yaml steps=2.5", ["steps: must be a whole number"]),
    ("train tiny.yaml eval.temperatures=[-1]", ["eval.temperatures"]),
    ("train tiny.yaml model=3", ["model"]),
    ("train tiny.yaml sampling.temperature=0", ["sampling.temperature is 0", "eval.temperatures"]),
    ("train tiny.yaml sampling.max_tokens=512", ["sampling.max_tokens=512 leaves no room", "512 positions"]),
    ("train tiny.yaml model.shape={hidden_sizes:3}", ["Qwen3 has no 'hidden_sizes' (did you mean 'hidden_size'?)"]),
    ("train tiny.yaml model.shape={hidden_size:big}", ["hidden_size='big'", "whole numbers"]),
    ("train tiny.yaml model.lora={rank:2,targets:[nothing]}", ["nothing"]),
    ("train tiny.yaml model.lora={rank:2,targets:[lm_head]}", ["lm_head", "leave it out"]),
    ("train tiny.yaml name=a_folder/../..", ["runs"]),
    # objective, teacher, view
    ("train tiny.yaml objective=[{distill:reverse_kll}]", ["reverse_kll", "reverse_kl"]),
    ("train tiny.yaml objective=[{distill:reverse_kl,support:{student_topk:{k:1000}}}]", ["k is 1000", "24 tokens", "at most 24"]),
    ("train tiny.yaml objective=[]", ["objective"]),
    ("train tiny.yaml teacher= view= signals={}", ["main"]),
    ("train tiny.yaml method=opd teacher={external:{path:''}}", ["needs a model", "teacher.external.path=FOLDER"]),
    ("train tiny.yaml teacher=frosen", ["'frosen'", "live | frozen"]),
    ("train tiny.yaml teacher={ema:{rat:0.1}}", ["{ema: {rate: 0.05, every: 1}}"]),
    ("train tiny.yaml teacher={ema:{rate:2}}", ["EMA rate is 2", "from 0"]),
    ("train tiny.yaml teacher={external:{path:models/other_tokens}}", ["another tokenizer than the student", "student's family"]),
    ("train tiny.yaml teacher={external:{path:models/few_rows}}", ["head has 10 rows", "24 tokens"]),
    ("train tiny.yaml teacher={external:{path:models/nowhere}}", ["no model folder 'models/nowhere'"]),
    ("train tiny.yaml teacher={external:{path:models/broken_weights}}", ["cannot load 'models/broken_weights'"]),
    ("train tiny.yaml view=solutoin", ["unknown name 'solutoin' (did you mean 'solution'?)"]),
    ("train tiny.yaml view={solution:{template:nothing}}", ["no template 'nothing'"]),
    ("train tiny.yaml view={hint:{name:proof}}", ["'proof'"]),
    ("train tiny.yaml method=grpo group=1 teacher= view=", ["group"]),
    ("train tiny.yaml rollout.filter=mixed_groups", ["needs group 2 or more"]),
    ("train tiny.yaml rollout.source={dataset:proof}", ["learns from 'proof'", "solution"]),
    ("train tiny.yaml rollout.source=teacher", ["student | {dataset: HINT}"]),
    # data
    ("train tiny.yaml data={}", ["give either task", "expr"]),
    ("train tiny.yaml data.path=good.jsonl", ["give either task"]),
    ("train tiny.yaml data.task=exprr", ["no embedded task 'exprr' (did you mean 'expr'?)"]),
    ("train tiny.yaml data.difficulty=hardest", ["no difficulty 'hardest' (did you mean 'hard'?)"]),
    ("train tiny.yaml data.split=training", ["no split 'training'"]),
    ("train tiny.yaml data.max_prompt_tokens=3", ["longer than 3 tokens", "data.max_prompt_tokens"]),
    ("train tiny.yaml data.verifier=maths", ["unknown name 'maths' (did you mean 'math'?)"]),
    (["train", "tiny.yaml", "data.verifier={fn: 'nowhere:judge'}"], ["cannot import 'nowhere'"]),
    (["train", "tiny.yaml", "data.verifier={fn: 'os:getcwd'}"], ["must accept (prompt, text)"]),
    (["train", "tiny.yaml", data("god")], ["god.jsonl does not exist (did you mean 'good.jsonl'?)"]),
    (["train", "tiny.yaml", 'data={"path": "a_folder"}'], ["a_folder is a folder"]),
    (["train", "tiny.yaml", data("malformed")], ["malformed.jsonl:3: malformed JSON"]),
    (["train", "tiny.yaml", data("empty")], ["empty.jsonl is empty"]),
    (["train", "tiny.yaml", data("no_question")], ["no_question.jsonl:2: the record has no prompt or question", "data.columns"]),
    (["train", "tiny.yaml", data("no_answer")], ["no_answer.jsonl:3: the record has no answer", "data.columns"]),
    (["train", "tiny.yaml", data("null_answer")], ["null_answer.jsonl:1: the record has no answer"]),
    (["train", "tiny.yaml", data("wrong_type")], ["wrong_type.jsonl:2: the prompt must be a text"]),
    (["train", "tiny.yaml", data("a_list")], ["a_list.jsonl:1: expected a JSON object"]),
    (["train", "tiny.yaml", data("twice")], ["twice.jsonl:3", "line 1"]),
    (["train", "tiny.yaml", data("latin")], ["latin.jsonl:1: not UTF-8"]),
    (["train", "tiny.yaml", data("no_gold")], ["no_gold.jsonl:2: the gold answer", "data.verifier"]),
    (["train", "tiny.yaml", data("one")], ["cannot hold out", "data.eval_path"]),
    (["train", "tiny.yaml", data("good", eval_path="nowhere.jsonl")], ["nowhere.jsonl does not exist"]),
    (["train", "tiny.yaml", data("good", columns={"solution": "proof"})], ["no column 'proof'"]),
    (["train", "tiny.yaml", data("long")], ["1 of 13 prompts are longer than", "data.max_prompt_tokens"]),
    (["train", "tiny.yaml", data("no_solution")], ["what the view 'solution' shows", "data.columns", "view=answer", "grpo or rloo", "sdpo"]),
    (
        ["train", "tiny.yaml", data("no_solution"), "method=sft", "teacher=", "view=", "objective=[{nll: {}}]"],
        ["learns from 'solution'", "10 of 10", "sdpo", "opd (a stronger"],
    ),
    (["train", "tiny.yaml", data("good"), "model.vocabulary=100"], ["vocabulary of 100 is too small"]),
    # models
    ("train tiny.yaml model.path=models/nowhere", ["no model folder 'models/nowhere'"]),
    ("train tiny.yaml model.path=tiny.yaml", ["no model folder 'tiny.yaml'"]),
    ("train tiny.yaml model.path=models/no_weights", ["cannot load 'models/no_weights'"]),
    ("train tiny.yaml model.path=models/broken_weights", ["cannot load 'models/broken_weights'"]),
    ("train tiny.yaml model.path=models/missing_weights", ["lacks", "weights", "incomplete"]),
    ("train tiny.yaml model.path=models/bad_config", ["models/bad_config"]),
    ("train tiny.yaml model.path=models/no_tokenizer", ["models/no_tokenizer", "has no tokenizer"]),
    ("train tiny.yaml model.path=models/few_rows", ["head has 10 rows", "24 tokens"]),
    ("train tiny.yaml model.path=models/good model.attention=flash_attention_2", ["cannot load 'models/good'"]),
    ("train tiny.yaml init=runs/nowhere", ["init: runs/nowhere is no run folder"]),
    # engine
    ("train tiny.yaml engine.audit_nats=1e-12", ["engine and learner disagree on log-probs by", "audit_nats=1e-12", "Use float32"]),
    # W&B
    ("train tiny.yaml track.wandb=online", ["track.wandb=offline"]),
    ("train tiny.yaml track.wandb=on-line", ["track.wandb", "offline"]),
]


def flow(words):
    """The words of a command; {a:b} stands for YAML's {a: b}."""
    return [re.sub(r"(?<=[a-z]):(?=[a-z0-9{\['])", ": ", word) for word in words.split()]


def everything(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("words", "expected"), CASES, ids=[words if isinstance(words, str) else " ".join(words) for words, _ in CASES])
def test_a_mistake_is_one_sentence_with_the_fix_and_nothing_is_created(workplace, capfd, monkeypatch, words, expected):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(workplace / "no_netrc"))
    before = everything(workplace)
    status = main(flow(words) if isinstance(words, str) else words)
    said = capfd.readouterr()
    assert status == 2, said.err
    assert said.err.startswith("opd: ") and "Traceback" not in said.err and said.err.count("\n") == 1, said.err
    for part in expected:
        assert part in said.err, said.err
    assert everything(workplace) == before


OWN = {  # what the sentences on missing solutions name -> its keys
    "an answer": ["view=answer"],
    "grpo": ["method=grpo", "teacher=", "view=", "group=2"],
    "rloo": ["method=rloo", "teacher=", "view=", "group=2"],
    "sdpo": ["method=sdpo", "group=2", "view={feedback: {solution: peer_success, own: false}}"],
    "opd": ["method=opd", "teacher={external: {path: teacher}}", "view=plain", "model.path=teacher"],
}


@pytest.mark.parametrize("named", OWN)
def test_what_is_named_for_data_without_solutions_runs_on_it(workplace, named):
    bare = {key: value for key, value in TINY.items() if key != "data"}
    (workplace / "own.yaml").write_text(yaml.safe_dump({**bare, "sampling": {"max_tokens": 4}}))
    if named == "opd":
        save_model(workplace / "teacher", train_byte_bpe(["What is 1 + 1? 23456789#"], 300))
    short = ["steps=1", "model.vocabulary=300", "eval.num_problems=0", "eval.final_problems=0"]
    assert main(["train", "own.yaml", data("no_solution"), *OWN[named], *short]) == 0
