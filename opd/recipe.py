"""A recipe as a typed, frozen tree: every key has a default and a description.

A method file (`recipes/methods/`) and a run file (`recipes/runs/`) share this tree; a run names its method and its own keys win.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Choice = str | dict[str, Any]


class LoRA(_Frozen):
    """Low-rank adapters through peft; the frozen teacher is then the adapter switched off."""

    rank: Positive = Field(default=16, description="rank of the factors")
    alpha: float = Field(default=32.0, gt=0, description="scale numerator; the update is alpha / rank times B A")
    targets: str | list[str] = Field(default="all-linear", description="module names, or all-linear (never the head)")


class Model(_Frozen):
    """The student."""

    path: str = Field(default="", description="Hugging Face folder or hub name; models/<name> inside the package is found too")
    init: Literal["pretrained", "random"] = Field(default="pretrained", description="random: fresh weights of the architecture in `path` or `shape`")
    shape: dict[str, Any] = Field(
        default={}, description="Qwen3 config values for a new model when `path` is empty (hidden_size, num_hidden_layers ...)"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="weights and activations; the head always computes in fp32")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(default="sdpa", description="attention kernel of the Hugging Face model")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    lora: LoRA | None = Field(default=None, description="train low-rank adapters instead of all weights")
    vocabulary: Positive = Field(
        default=512, description="size of the byte-level BPE vocabulary trained from the data when the model has no tokenizer"
    )


class PassRate(_Frozen):
    """Keeps the prompts that a model solves sometimes."""

    file: str = Field(description="generations/*.jsonl that `opd eval` wrote for these prompts")
    low: float = Field(default=0.1, ge=0, le=1, description="lowest share of right answers")
    high: float = Field(default=0.9, ge=0, le=1, description="highest share of right answers")


class Decontaminate(_Frozen):
    """Leaves out training prompts that share text with an exam."""

    against: list[str] = Field(description="files, hub names or presets whose questions must not be trained on; the run's own evaluation always is")
    ngram: Positive = Field(default=13, description="words in a row that count as shared text")


class Data(_Frozen):
    """Where prompts come from and who judges the answers."""

    task: str = Field(default="", description="name of an embedded task (expr ...); empty when `path` or `preset` is given")
    difficulty: str = Field(default="", description="difficulty setting of the embedded task; empty: its default")
    split: str = Field(default="train", description="split of the embedded task or hub data set that training draws from")
    path: str = Field(
        default="", description="JSONL, JSON, Parquet or CSV file, or owner/name on the hub; {question, answer with ####} or columns named below"
    )
    preset: str = Field(default="", description="a public data set by name (gsm8k, math, dapo_math ...); `path` then replaces its source")
    subset: str = Field(default="", description="configuration of the hub data set")
    limit: NonNegative = Field(default=0, description="read only the first records (a hub data set is then streamed); 0: all")
    repair: list[Literal["duplicate", "ungradable", "incomplete", "too_long"]] = Field(
        default=[], description="records that are left out and counted; kinds that are not named stop the run before it starts"
    )
    decontaminate: Decontaminate | None = Field(default=None, description="training prompts that share text with an exam are left out and counted")
    pass_rate: PassRate | None = Field(default=None, description="keep prompts by how often a model solved them")
    eval_path: str = Field(default="", description="file or hub name for evaluation; empty: held-out records of the training data")
    eval_split: str = Field(default="test", description="split of `eval_path` on the hub")
    columns: dict[str, str] = Field(default={}, description="our name -> the file's column, e.g. {prompt: problem, solution: gold}")
    verifier: Choice = Field(default="auto", description="name in opd.verify, {fn: module:name}, or auto (the task's own, math for JSONL)")
    system: str = Field(default="", description="system message put before every question")
    max_prompt_tokens: Positive = Field(
        default=1024, description="longer prompts are refused, tokens; a view may be as long as the model allows, its hint is shortened beyond that"
    )


class Sampling(_Frozen):
    """How the student answers during training; the loss uses the same temperature."""

    temperature: float = Field(default=1.0, ge=0, description="softmax temperature of sampling, student and in-process teacher")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus mass")
    top_k: NonNegative = Field(default=0, description="keep the k most likely tokens; 0 keeps all")
    max_tokens: Positive = Field(default=64, description="longest completion, tokens")


class Rollout(_Frozen):
    """Who answers and which groups are kept."""

    prompts: Positive = Field(default=32, description="prompts a step")
    source: Choice = Field(
        default="student",
        description="student | {dataset: HINT} | {view: SIGNAL} | {paired: {dataset: HINT}} | {mixed: {student: share, dataset or view: NAME}}",
    )
    sampler: Choice = Field(
        default="student",
        description="who draws the student's tokens: student | {mixture: {share: s}} | {interleave: {k: n}} | teacher, with signal: main",
    )
    filter: Literal["none", "mixed_groups"] = Field(default="none", description="mixed_groups drops groups whose rewards are all equal and refills")
    max_refill: NonNegative = Field(default=4, description="extra rounds of generation to refill a filtered batch")
    overlong: Literal["keep", "mask"] = Field(default="keep", description="mask: completions cut at max_tokens leave the loss")


class Engine(_Frozen):
    """What generates."""

    kind: Literal["torch"] = Field(default="torch", description="torch: in process, around the unmodified Hugging Face module")
    token_budget: Positive = Field(default=32768, description="tokens (rows x longest, cache included) held at once while generating")
    audit_nats: float = Field(default=0.01, gt=0, description="largest mean |log-prob difference| between engine and learner at start, nats")


class EMA(_Frozen):
    """Exponential moving average of the student: shadow <- (1 - rate) shadow + rate weights, every so many rollout steps.

    Rate 1 is a copy of the student that is at most `every` steps old.
    """

    rate: float = Field(default=0.05, ge=0, le=1)
    every: Positive = 1


class External(_Frozen):
    """Another model with the same tokenizer."""

    path: str


class Signal(_Frozen):
    """A scorer: weights plus a view (what it may read before the student's tokens)."""

    weights: Choice = Field(
        default="frozen",
        description="live | frozen | {ema: {rate: r, every: steps}} | {external: {path: p}}; beside path, tokenizer: own",
    )
    view: Choice = Field(default="plain", description="name in opd.views, or {name: {parameters}}")


class Writer(_Frozen):
    """A request that the student answers about each answer before the views are made; a view `note` may show the text, a weight `marked` use it."""

    ask: str = Field(description="the request, with {question} {solution} {answer} {attempt} {feedback} or {segments} (the attempt's, numbered)")
    role: str = Field(default="", description="system message; empty: none")
    about: Literal["all", "correct", "wrong"] = Field(default="all", description="which answers")
    max_tokens: Positive = Field(default=64, description="longest text, tokens; texts are greedy and count among the student's tokens")
    points: bool = Field(default=False, description="the first line names segments of the attempt by number: their tokens are marked")
    coverage: float = Field(default=0.25, gt=0, le=1, description="largest marked share of an answer's tokens")
    until: NonNegative = Field(default=0, description="step from which nothing is written any more; 0: never")
    budget: NonNegative = Field(default=0, description="tokens a step at most (and rank); requests beyond it are left out and counted; 0: no limit")


class Updates(_Frozen):
    """Optimiser steps on one batch of rollouts."""

    minibatches: Positive = 1
    epochs: Positive = 1


class Optimizer(_Frozen):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegative = 0
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(default=1.0, gt=0, description="largest global gradient norm")


class Learner(_Frozen):
    """Who applies the updates."""

    kind: Literal["auto", "torch", "deepspeed"] = Field(default="auto", description="auto: deepspeed where it imports, else torch")
    token_budget: Positive = Field(default=16384, description="tokens of a micro-batch, padding included")
    chunk_bytes: Positive = Field(default=64 << 20, description="bytes of logits held at once by the head")
    packed: bool = Field(default=False, description="packed sequences instead of padded rows")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=0, description="DeepSpeed ZeRO stage")
    max_skipped: NonNegative = Field(
        default=5, description="updates in a row that may be refused for a non-finite loss or gradient before the run stops"
    )


class Budget(_Frozen):
    """Stop rules; 0 means none. `steps` at top level is always one."""

    generated_tokens: NonNegative = Field(default=0, description="student tokens generated, discarded ones included, evaluation not")
    seconds: float = Field(default=0.0, ge=0, description="training seconds, evaluation not")


class Eval(_Frozen):
    """Evaluation during (dev) and after (test) training."""

    every: NonNegative = Field(default=20, description="steps between evaluations on the dev split; 0: only before and after")
    num_problems: NonNegative = Field(default=128, description="problems of the dev split; 0: no evaluation during training")
    samples: Positive = Field(default=1, description="answers a problem on the dev split at temperature 1")
    final_problems: NonNegative = Field(default=256, description="problems of the test split; 0: no final evaluation")
    final_samples: Positive = Field(default=4, description="answers a problem on the test split at each non-zero temperature")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(default=[1.0, 0.0], description="decodings of the final evaluation; 0 is greedy")
    before: bool = Field(default=True, description="evaluate the dev split before the first step")


class Checkpoint(_Frozen):
    """What is kept on disk."""

    every: NonNegative = Field(default=50, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(default=2, description="newest checkpoints kept, besides the best")
    best: bool = Field(default=True, description="keep the checkpoint with the best dev accuracy and report it on test")


class Guard(_Frozen):
    """Rules that watch the run for collapse, leaks, style drift and reward hacking; see docs/guard_rails.md."""

    action: Literal["off", "warn", "pause", "roll_back"] = Field(
        default="warn",
        description="what a rule does unless `rules` says otherwise: warn; pause (save and stop); roll_back (the weights of the last good "
        "checkpoint, the questions that come next)",
    )
    rules: dict[str, Choice | bool] = Field(default={}, description="rule -> action, or {action: pause, parameter: value}; off switches it off")
    answers: Positive = Field(default=64, description="answers a step, in whole groups, that the rules on texts read")
    ngram: Positive = Field(default=8, description="tokens in a row, taken from a teacher's view, that count as a leak")
    rate_factor: float = Field(default=0.5, gt=0, le=1, description="multiplies the learning rate at every roll back")
    max_roll_backs: NonNegative = Field(default=2, description="after so many the next alarm pauses")


class Track(_Frozen):
    """Logging."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(default="auto", description="auto: online when logged in, else offline")
    project: str = "opd"
    texts: bool = Field(default=True, description="false keeps questions, answers and hints out of W&B")
    samples_every: NonNegative = Field(default=25, description="steps between sample files for `opd inspect`; 0: only the last step")
    samples: Positive = Field(default=16, description="rollouts a sample file")
    bundle_steps: list[Positive] = Field(
        default=[], description="steps that are frozen into bundles/ as they happen, for `opd replay`; `opd bundle` makes one of a run that repeats"
    )


class Recipe(_Frozen):
    """One run: a method, a model, data and hardware."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(default="", description="run folder under runs/; empty: recipe-method-seed-hash")
    method: str = Field(default="", description="file of recipes/methods that the other keys refine")
    paper: str = Field(default="", description="link to the method's source")
    seed: NonNegative = 0
    steps: Positive = Field(default=100, description="rollout steps at most")
    init: str = Field(default="", description="run folder whose final model the student starts from (stages chain this way)")
    model: Model = Model()
    data: Data = Data()
    group: Positive = Field(default=1, description="samples a prompt")
    rollout: Rollout = Rollout()
    sampling: Sampling = Sampling()
    engine: Engine = Engine()
    teacher: Choice = Field(default="", description="sugar for signals.main.weights")
    view: Choice = Field(default="", description="sugar for signals.main.view")
    signals: dict[str, Signal] = Field(default={}, description="named scorers; `teacher` and `view` make the one called main")
    writers: dict[str, Writer] = Field(default={}, description="texts that the student writes about answers, by the name that views and weights use")
    objective: list[dict[str, Any]] = Field(default=[], description="terms, summed; see docs/concepts.md")
    updates: Updates = Updates()
    optimizer: Optimizer = Optimizer()
    learner: Learner = Learner()
    budget: Budget = Budget()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    track: Track = Track()

    @model_validator(mode="before")
    @classmethod
    def _main_signal(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not (raw.get("teacher") or raw.get("view")):
            return raw
        main = {"weights": raw.get("teacher") or "frozen", "view": raw.get("view") or "plain"}
        declared = raw.get("signals") or {}
        if "main" in declared and declared["main"] not in (main, {**main, "weights": main["weights"]}):
            raise ValueError("`teacher`/`view` are sugar for signals.main: give one or the other")
        return {**raw, "signals": {**declared, "main": main}}
