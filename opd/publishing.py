"""`opd publish`: a run's chosen model as a folder that others can use (adapters merged, tokenizer, model card), and on the hub if asked."""

import json
import re
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HfHubHTTPError

from opd.build import pretrained
from opd.config.load import parse_overrides
from opd.data.presets import PRESETS
from opd.run.folder import read_lines
from opd.run.named import find_run

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
OPTIONS = ("out", "repo", "private", "adapter")


def publish(run: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> str:
    """Write the folder (RUN/published, or `out`) and push it to `repo` where given (private unless private=false); returns a sentence.

    A run's model/ holds its adapters merged into the weights; it is loaded once as a check. adapter=true: the factors alone, for peft, which
    adds them to the base model. Raises ValueError with the fix.
    """
    options = parse_overrides(overrides)
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"opd publish RUN: unknown option {unknown[0]!r}; options: {', '.join(OPTIONS)}")
    folder, repo, private, alone = find_run(run), str(options.get("repo", "")), options.get("private", True), options.get("adapter", False)
    model, resolved = folder / "model", folder / "resolved.json"
    if not resolved.is_file():
        raise ValueError(f"{folder} has no resolved.json: nothing says how it was trained; publish what opd train made, e.g. runs/NAME")
    if not (model / "config.json").is_file():
        raise ValueError(f"{run} has no model/ yet: finish the run first (opd train with its recipe resumes it)")
    if repo and not _REPO.fullmatch(repo):
        raise ValueError(f"repo is {repo!r}; write repo=OWNER/NAME")
    for name, value in (("private", private), ("adapter", alone)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; write {name}=true or {name}=false")
    if alone and not (model / "adapter").is_dir():
        raise ValueError(f"{run} trained all weights, not adapters (model.lora): publish it without adapter=true")
    if repo:
        check_login(repo)
    out = Path(str(options.get("out", folder / "published")))
    if out.exists() and not (out / "opd.json").is_file():
        raise ValueError(f"{out} exists and was not written by opd publish: give another out=FOLDER")
    pretrained.load_model(str(model))
    shutil.rmtree(out, ignore_errors=True)
    facts = json.loads(resolved.read_text(encoding="utf-8"))
    copy_adapter(model, out, facts) if alone else shutil.copytree(model, out, ignore=shutil.ignore_patterns("adapter"))
    rows = list(read_lines(folder / "eval.jsonl")) + list(read_lines(folder / "evaluations/eval.jsonl"))
    (out / "opd.json").write_text(json.dumps(public_facts(facts), indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(repo or folder.name, facts, rows, last_totals(folder), alone), encoding="utf-8")
    if not repo:
        return f"{out}: {'adapters' if alone else 'weights'}, tokenizer and model card; push it with repo=OWNER/NAME"
    return f"{out} -> {push(out, repo, private)}"


def copy_adapter(model: Path, out: Path, facts: Mapping[str, Any]) -> None:
    """The factors and the tokenizer; adapter_config.json names the base model, by hub name or by its folder's last name."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "config.json", "generation_config.json", "adapter"))
    shutil.copytree(model / "adapter", out, dirs_exist_ok=True)
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    given = {"base_model_name_or_path": _base(facts["recipe"]) or None}
    (out / "adapter_config.json").write_text(json.dumps({**config, **given}, indent=1) + "\n", encoding="utf-8")


def check_login(repo: str) -> str:
    """The user that the hub knows. Raises ValueError with the fix where there is none, or no connection."""
    if huggingface_hub.get_token() is None:
        raise ValueError(f"repo={repo}: nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that may write")
    try:
        return huggingface_hub.whoami()["name"]
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"repo={repo}: the hub does not accept the login or cannot be reached ({_first_line(error)}): check HF_TOKEN and the connection "
            "(HF_HUB_OFFLINE must not be 1); without repo the folder is written here"
        ) from None


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload the folder's files as one commit; returns the page's address. Raises ValueError where the hub refuses."""
    try:
        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="opd publish"))
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"repo={repo}: the hub refused ({_first_line(error)}): may the token write there? The folder {folder} stays") from None


def public_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """resolved.json without what is about this machine alone: folders above the last name, host, process."""
    kept = ("schema_version", "recipe", "packages", "git_commit", "code_hash", "learner", "num_parameters", "template_hash", "model_hash")
    return {key: _without_folders(value) for key, value in facts.items() if key in kept}


def model_card(
    name: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], totals: Mapping[str, float], alone: bool = False
) -> str:
    """Markdown with the hub's header: what it was made from, how, and how it did. alone: of adapters without the weights that they adapt."""
    recipe = facts["recipe"]
    base, preset = _base(recipe), PRESETS.get(recipe["data"].get("preset") or "")
    header: dict[str, Any] = {"library_name": "peft" if alone else "transformers", "pipeline_tag": "text-generation"}
    header["tags"] = ["opd", recipe["method"] or "opd-recipe"]
    if base and _REPO.fullmatch(base) and not base.startswith(("models/", "runs/")):
        header["base_model"] = base
    if preset:
        header["datasets"] = [preset.path]
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---", f"# {name.rpartition('/')[2]}", "",
        f"Trained with [opd](https://pypi.org/project/opd-train/): method `{recipe['method'] or 'own objective'}`"
        + (f" ([source]({recipe['paper']}))" if recipe.get("paper") else "") + (f", from `{base}`." if base else ", from random weights."), "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in _table(recipe, facts, totals, preset, alone)), "",
    ]  # fmt: skip
    shown = [row for row in rows if row.get("split") != "dev"]
    if shown:
        lines += ["## Evaluation", "", "95 % intervals over problems.", "", "| suite, split | decoding | avg@k | pass@k | maj@k | cut | problems |"]
        lines += ["|---|---|---|---|---|---|---|", *map(_row, shown), ""]
    imports = ["from peft import PeftModel"] * alone + ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    uses = [f'model = AutoModelForCausalLM.from_pretrained("{name}")']
    if alone:
        uses = [f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base or "BASE"}"), "{name}")']
    lines += [
        "## Use", "", "```python", *imports, "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")', *uses, "```", "",
        "These are adapters: they need the base model." if alone else "Adapters, if there were any, are merged into the weights.",
        "`opd.json` holds the whole recipe.",
        "The licence is the base model's and the data's: add it here.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def last_totals(folder: Path) -> dict[str, float]:
    """The last line of metrics.jsonl; {} for a run that was not trained."""
    return deque(read_lines(folder / "metrics.jsonl"), maxlen=1).pop() if (folder / "metrics.jsonl").is_file() else {}


def _table(recipe: Mapping[str, Any], facts: Mapping[str, Any], totals: Mapping[str, float], preset: Any, alone: bool) -> list[tuple[str, str]]:
    data, lora = recipe["data"], recipe["model"].get("lora")
    source = data.get("task") or (preset.path if preset else "") or Path(data.get("path") or "").name
    teachers = [f"{name}: {_short(signal['weights'])}, view {_short(signal['view'])}" for name, signal in recipe["signals"].items()]
    found = [
        ("data", source + (f" ({preset.licence})" if preset and preset.licence else "")),
        ("judged by", _short(data["verifier"])),
        ("teachers", "; ".join(teachers)),
        ("objective", "; ".join(_short(term) for term in recipe["objective"])),
        ("steps", f"{totals['step']:.0f} of {recipe['rollout']['prompts']} prompts x {recipe['group']}" if "step" in totals else ""),
        ("generated tokens", f"{totals['tokens/student']:,.0f}" if "tokens/student" in totals else ""),
        ("learning rate", f"{recipe['optimizer']['lr']:g}, {recipe['optimizer']['schedule']}"),
        ("adapters", f"LoRA, rank {lora['rank']}, {'alone' if alone else 'merged'}" if lora else ""),
        ("parameters", f"{facts['num_parameters']:,}" if "num_parameters" in facts else ""),
    ]
    return [(key, value) for key, value in found if value]


def _row(row: Mapping[str, Any]) -> str:
    def figure(key: str, interval: str) -> str:
        if row[key] is None:
            return "not judged"
        low, high = row.get(interval) or (None, None)
        spread = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
        return f"{100 * row[key]:.1f}{spread}"

    k = row["k"]
    cells = (figure("avg@k", "interval"), figure("pass@k", "pass@k_interval"), figure("maj@k", "maj@k_interval"))
    cells = (f"{row['suite']}, {row['split']}", f"{row['decoding']}, k = {k}", *cells, f"{100 * row['truncated']:.1f} %", str(row["n_problems"]))
    return f"| {' | '.join(cells)} |"


def _base(recipe: Mapping[str, Any]) -> str:
    path = recipe["model"].get("path") or ""
    return _without_folders(path) if recipe["model"].get("init") != "random" or recipe.get("init") else ""


def _short(value: Any) -> str:
    value = _without_folders(value)
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=1000).strip()


def _without_folders(value: Any) -> Any:
    """Absolute paths become their last name: they are about this machine."""
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value else value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
