"""A recipe as a typed, frozen tree: every key has a default and a description.

A method file (`recipes/methods/`) and a run file (`recipes/runs/`) share this tree; a run names its method and its own keys win.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from opd.config.base import Choice, Frozen, NonNegative, Positive
from opd.config.engine import Engine
from opd.config.model import Model, Target
from opd.config.rollout import Rollout
from opd.config.spending import Budget, Prices, Profile, check_profile, check_spending

SCHEMA_VERSION = 1


class PassRate(Frozen):
    """Keeps the prompts that a model solves sometimes."""

    file: str = Field(description="generations/*.jsonl that `opd eval` wrote for these prompts")
    low: float = Field(default=0.1, ge=0, le=1, description="lowest share of right answers")
    high: float = Field(default=0.9, ge=0, le=1, description="highest share of right answers")


class Decontaminate(Frozen):
    """Leaves out training prompts that share text with an exam."""

    against: list[str] = Field(description="files, hub names or presets whose questions must not be trained on; the run's own evaluation always is")
    ngram: Positive = Field(default=13, description="words in a row that count as shared text; a shorter question counts whole, from six words on")


class Data(Frozen):
    """Where prompts come from and who judges the answers."""

    task: str = Field(default="", description="name of an embedded task (expr ...); empty when `path` or `preset` is given")
    difficulty: str = Field(default="", description="difficulty setting of the embedded task; empty: its default")
    split: str = Field(default="train", description="split of the embedded task or hub data set that training draws from")
    path: str = Field(
        default="", description="JSONL, JSON, Parquet, Arrow, CSV file, or owner/name on the hub; {question, answer with ####} or columns named below"
    )
    preset: str = Field(default="", description="a public data set by name (gsm8k, math, dapo_math ...); `path` then replaces its source")
    subset: str = Field(default="", description="configuration of the hub data set")
    limit: NonNegative = Field(default=0, description="read only the first records (a hub data set is then streamed); 0: all")
    stream: bool = Field(default=False, description="records are read as they are needed, for data larger than memory")
    buffer: Positive = Field(default=2048, description="with stream: prompts held at once, among which the next one is drawn at random")
    repair: list[Literal["duplicate", "ungradable", "incomplete", "too_long"]] = Field(
        default=[], description="records that are left out and counted; kinds that are not named stop the run before it starts"
    )
    decontaminate: Decontaminate | None = Field(default=None, description="training prompts that share text with an exam are left out and counted")
    pass_rate: PassRate | None = Field(default=None, description="keep prompts by how often a model solved them")
    eval_path: str = Field(default="", description="file or hub name for evaluation; empty: held-out records of the training data")
    eval_split: str = Field(default="test", description="split of `eval_path` on the hub")
    columns: dict[str, str] = Field(default={}, description="our name -> the file's column, e.g. {prompt: problem, solution: gold}")
    verifier: Choice = Field(default="auto", description="name in opd.verify, {fn: module:name}, or auto (the task's own, math for JSONL)")
    verifier_seconds: float = Field(
        default=300.0, gt=0, description="longest time for one verdict of a function of one's own, seconds; then the run ends with an error"
    )
    verdict_cache: str = Field(default="", description="SQLite file of verdicts that were given before; empty: none")
    system: str = Field(default="", description="system message put before every question")
    thinking: bool | None = Field(
        default=None, description="what the student's chat template is told (enable_thinking); null: the template's own default"
    )
    max_prompt_tokens: Positive = Field(
        default=1024, description="longer prompts are refused, tokens; a view may be as long as the model allows, its hint is shortened beyond that"
    )


class Sampling(Frozen):
    """How the student answers during training; the loss uses the same temperature."""

    temperature: float = Field(default=1.0, ge=0, description="softmax temperature of sampling, student and in-process teacher")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus mass")
    top_k: NonNegative = Field(default=0, description="keep the k most likely tokens; 0 keeps all")
    max_tokens: Positive = Field(default=64, description="longest completion, tokens")


class Cluster(Frozen):
    """The Ray cluster that the actors live in."""

    address: str = Field(default="", description="auto, or HOST:PORT of a running cluster; empty: one on this machine, started with the run")


class Asynchrony(Frozen):
    """Answers for coming steps are written while the present one learns; see docs/asynchrony.md."""

    max_staleness: NonNegative = Field(
        default=0, description="versions that an answer may be older than the learner that reads it; 0: the synchronous loop"
    )
    in_flight: bool = Field(default=False, description="new weights also reach answers that are being written, from their next token on")


class EMA(Frozen):
    """Exponential moving average of the student: shadow <- (1 - rate) shadow + rate weights, every so many rollout steps.

    Rate 1 is a copy of the student that is at most `every` steps old.
    """

    rate: float = Field(default=0.05, ge=0, le=1)
    every: Positive = 1


class External(Frozen):
    """Another model with the same tokenizer."""

    path: str


class Signal(Frozen):
    """A scorer: weights plus a view (what it may read before the student's tokens)."""

    weights: Choice = Field(
        default="frozen",
        description="live | frozen | {ema: {rate: r, every: steps}} | {external: {path: p}}; beside path, "
        "engine: vllm (and tensor_parallel: GPUs that share it), or tokenizer: own",
    )
    view: Choice = Field(default="plain", description="name in opd.views, or {name: {parameters}}")
    thinking: bool | Literal["student"] | None = Field(
        default="student", description="what the chat template is told for this view; student: as data.thinking, anything else differs on purpose"
    )
    scores: str = Field(default="", description="file that `opd score` wrote: this teacher's scores of the data's answers are read from it")
    domain: str = Field(default="", description="score only prompts of this domain (or of its parts, domain/...); empty: all")


class Writer(Frozen):
    """A request about each answer, before the views are made; a view `note` may show what is written, a weight `marked` use it."""

    ask: str = Field(description="the request, with {question} {solution} {answer} {attempt} {feedback} or {segments} (the attempt's, numbered)")
    role: str = Field(default="", description="system message, with {speaker}; empty: none")
    by: list[str] = Field(default=[], description="signals whose weights write, each as {speaker}; empty: the student")
    rounds: Positive = Field(default=1, description="rounds of a debate between those in `by`; the note is the transcript")
    reply: str = Field(default="", description="the request from the second round on, with {transcript}: all turns of the rounds before")
    about: Literal["all", "correct", "wrong"] = Field(default="all", description="which answers")
    max_tokens: Positive = Field(default=64, description="longest text, tokens; texts are greedy and count among the student's tokens")
    points: bool = Field(default=False, description="the first line names segments of the attempt by number: their tokens are marked")
    coverage: float = Field(default=0.25, gt=0, le=1, description="largest marked share of an answer's tokens")
    until: NonNegative = Field(default=0, description="step from which nothing is written any more; 0: never")
    budget: NonNegative = Field(default=0, description="tokens a step at most (and rank); requests beyond it are left out and counted; 0: no limit")


class Updates(Frozen):
    """Optimiser steps on one batch of rollouts."""

    minibatches: Positive = 1
    epochs: Positive = 1


class Optimizer(Frozen):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegative = 0
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(default=1.0, gt=0, description="largest global gradient norm")


class Learner(Frozen):
    """Who applies the updates."""

    kind: Literal["auto", "torch", "deepspeed"] = Field(default="auto", description="auto: deepspeed where it imports, else torch")
    ranks: Positive = Field(default=1, description="learner processes on this machine (deepspeed), one a GPU where there are GPUs")
    token_budget: Positive = Field(
        default=16384, description="tokens of a micro-batch, padding included; a teacher of its own in process reads twice as many at once"
    )
    chunk_bytes: Literal["auto"] | Positive = Field(default="auto", description="bytes of logits held at once; auto: by the memory free at the start")
    packed: bool = Field(default=False, description="packed sequences instead of padded rows")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=0, description="DeepSpeed ZeRO stage")
    offload: bool = Field(default=False, description="DeepSpeed keeps masters and moments in host memory and updates there; ZeRO 1 and above")
    max_skipped: NonNegative = Field(
        default=5, description="updates in a row that may be refused for a non-finite loss or gradient before the run stops"
    )


class Launch(Frozen):
    """The processes of a run with several ranks, and how a run goes on."""

    nodes: Positive = Field(default=1, description="machines; the same command runs on each, with its own node_rank")
    node_rank: NonNegative = Field(default=0, description="number of this machine, from 0; machine 0 writes the run folder")
    master: str = Field(default="", description="HOST:PORT of machine 0 where there are several; a free port that the others reach")
    restarts: NonNegative = Field(default=3, description="restarts after a dead or stalled rank before giving up; a new checkpoint resets the count")
    extend: bool = Field(default=False, description="go on to more steps though the learning rate falls with them (with a constant rate any run may)")
    deadline_seconds: float = Field(default=1800.0, gt=0, description="a rank that shows no sign of life for so long has stalled, seconds")


class Eval(Frozen):
    """Evaluation during (dev) and after (test) training."""

    every: NonNegative = Field(default=20, description="steps between evaluations on the dev split; 0: only before and after")
    num_problems: NonNegative = Field(default=128, description="problems of the dev split; 0: no evaluation during training")
    samples: Positive = Field(default=1, description="answers a problem on the dev split at temperature 1")
    final_problems: NonNegative = Field(default=256, description="problems of the test split; 0: no final evaluation")
    final_samples: Positive = Field(default=4, description="answers a problem on the test split at each non-zero temperature")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(default=[1.0, 0.0], description="decodings of the final evaluation; 0 is greedy")
    before: bool = Field(default=True, description="evaluate the dev split before the first step")


class Checkpoint(Frozen):
    """What is kept on disk."""

    every: NonNegative = Field(default=50, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(default=2, description="newest checkpoints kept, besides the best")
    best: bool = Field(default=True, description="keep the checkpoint with the best dev accuracy and report it on test")
    shard_mib: Positive = Field(default=4096, description="largest file of weights in `model/`, MiB; a larger model is saved in several")


class Guard(Frozen):
    """Rules that watch the run for collapse, leaks, style drift and reward hacking; see docs/guard_rails.md."""

    action: Annotated[Literal["off", "warn", "pause", "roll_back"], BeforeValidator(lambda v: "off" if v is False else v)] = Field(  # YAML
        default="warn",
        description="what a rule does unless `rules` says otherwise: warn; pause (save and stop); roll_back (the weights of the last good "
        "checkpoint, the questions that come next)",
    )
    rules: dict[str, Choice | bool] = Field(default={}, description="rule -> action, or {action: pause, parameter: value}; off switches it off")
    answers: Positive = Field(default=64, description="answers a step, in whole groups, that the rules on texts read")
    ngram: Positive = Field(default=8, description="tokens in a row, taken from a teacher's view, that count as a leak")
    rate_factor: float = Field(default=0.5, gt=0, le=1, description="multiplies the learning rate at every roll back")
    max_roll_backs: NonNegative = Field(default=2, description="after so many the next alarm pauses")


class Track(Frozen):
    """Logging."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(default="auto", description="auto: online when logged in, else offline")
    project: str = "opd"
    group: str = Field(default="", description="W&B group; `opd compare` sets the comparison's name")
    job_type: str = Field(default="", description="W&B job type; `opd compare` sets the arm")
    tags: list[str] = Field(default=[], description="W&B tags")
    texts: bool = Field(default=True, description="false keeps questions, answers and hints out of W&B")
    samples_every: NonNegative = Field(default=25, description="steps between sample files for `opd inspect`; 0: only the last step")
    samples: Positive = Field(default=16, description="rollouts a sample file")
    bundle_steps: list[Positive] = Field(
        default=[], description="steps that are frozen into bundles/ as they happen, for `opd replay`; `opd bundle` makes one of a run that repeats"
    )


class Recipe(Frozen):
    """One run: a method, a model, data and hardware."""

    schema_version: int = Field(default=SCHEMA_VERSION, description="format of this file; an older one is refused with what changed")
    name: str = Field(default="", description="run folder under runs/; empty: recipe-method-seed-hash")
    method: str = Field(default="", description="file of recipes/methods that the other keys refine")
    hardware: str = Field(default="", description="file of recipes/hardware between method and run: precision, ranks, token budgets, target")
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
    asynchrony: Asynchrony = Asynchrony()
    ray: Cluster = Cluster()
    teacher: Choice = Field(default="", description="sugar for signals.main.weights")
    view: Choice = Field(default="", description="sugar for signals.main.view")
    signals: dict[str, Signal] = Field(default={}, description="named scorers; `teacher` and `view` make the one called main")
    writers: dict[str, Writer] = Field(default={}, description="texts that student or teachers write about answers, by the name that views use")
    controllers: dict[str, Choice] = Field(default={}, description="schedules that views read by name, such as learned_exposure")
    objective: list[dict[str, Any]] = Field(default=[], description="terms, summed; see docs/concepts.md")
    updates: Updates = Updates()
    optimizer: Optimizer = Optimizer()
    learner: Learner = Learner()
    launch: Launch = Launch()
    target: Target = Target()
    budget: Budget = Budget()
    prices: Prices = Prices()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    track: Track = Track()
    profile: Profile = Profile()

    @model_validator(mode="before")
    @classmethod
    def _engine_by_name(cls, raw: Any) -> Any:
        named = isinstance(raw, dict) and isinstance(raw.get("engine"), str)
        return {**raw, "engine": {"kind": raw["engine"]}} if named else raw

    @model_validator(mode="before")
    @classmethod
    def _main_signal(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not (raw.get("teacher") or raw.get("view")):
            return raw
        main = {"weights": raw.get("teacher") or "frozen", "view": raw.get("view") or "plain"}
        declared = raw.get("signals") or {}
        given = declared.get("main", {})
        if not isinstance(given, dict) or any(given.get(key, value) != value for key, value in main.items()):
            raise ValueError("`teacher`/`view` are sugar for signals.main: give one or the other")
        return {**raw, "signals": {**declared, "main": {**given, **main}}}

    @model_validator(mode="after")
    def _scale_fits(self) -> "Recipe":
        if self.model.scale < 1 and self.model.init != "random":
            raise ValueError(f"model.scale is {self.model.scale:g}: weights that were trained cannot be made smaller; add model.init=random")
        if self.model.init == "random" and self.init:
            raise ValueError(f"model.init=random makes new weights, and init={self.init} names a run to start from: leave one of the two out")
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> "Recipe":
        if self.engine.kind == "torch" and self.engine.replicas > 1:
            raise ValueError(f"engine.replicas is {self.engine.replicas}, and engine.kind torch is this process: use engine.kind=process")
        if self.engine.kind == "torch" and self.asynchrony.max_staleness:
            raise ValueError(
                f"asynchrony.max_staleness is {self.asynchrony.max_staleness}: the student answers while the learner works, so it needs a process "
                "of its own: use engine.kind=process or engine.kind=vllm, or asynchrony.max_staleness=0"
            )
        if self.engine.placement == "colocated" and self.asynchrony.max_staleness:
            raise ValueError(
                f"engine.placement=colocated: actors sleep while the learner works, so they cannot answer ahead of it "
                f"(asynchrony.max_staleness={self.asynchrony.max_staleness}): use engine.placement=separate, or asynchrony.max_staleness=0"
            )
        if self.engine.lora == "adapters":
            lacks = {
                "engine.kind=vllm": self.engine.kind == "vllm", "model.lora.rank": self.model.lora is not None,
                "model.path or init (actors read the base model's weights there)": bool(self.model.path or self.init) and self.model.init != "random",
                "asynchrony.in_flight=false (an answer keeps the factors that it began with)": not self.asynchrony.in_flight,
            }  # fmt: skip
            if missing := [name for name, there in lacks.items() if not there]:
                raise ValueError(f"engine.lora=adapters needs {' and '.join(missing)}; or use engine.lora=merged")
        if self.engine.kind == "vllm" and self.engine.mode == "offline" and self.asynchrony.in_flight:
            raise ValueError(
                "asynchrony.in_flight: vLLM's offline engine cannot pause in mid-answer: use engine.mode=async, or asynchrony.in_flight=false"
            )
        if self.asynchrony.max_staleness and self.rollout.replay:
            raise ValueError(
                f"rollout.replay gives out answers up to {self.rollout.replay.max_age} steps old, and asynchrony.max_staleness="
                f"{self.asynchrony.max_staleness} drops older ones: use asynchrony.max_staleness=0, or leave out rollout.replay"
            )
        if self.asynchrony.in_flight and not self.asynchrony.max_staleness:
            raise ValueError("asynchrony.in_flight: nothing is in flight with max_staleness 0: use asynchrony.max_staleness=1 or more")
        if self.engine.kind != "torch" and self.rollout.sampler != "student":
            raise ValueError("rollout.sampler draws tokens from two models in this process: use engine.kind=torch, or rollout.sampler=student")
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> "Recipe":
        nodes, count = self.launch.nodes, self.launch.nodes * self.learner.ranks
        if self.learner.offload and (self.learner.kind == "torch" or not self.learner.zero_stage):
            raise ValueError("learner.offload is DeepSpeed's, from ZeRO 1 on: use learner.kind=deepspeed learner.zero_stage=1, or offload=false")
        if count > 1 and self.learner.kind == "torch":
            raise ValueError("learner.kind torch is one process: use learner.kind=deepspeed, or learner.ranks=1")
        if self.engine.transfer == "ipc" and (nodes > 1 or self.engine.num_gpus != count):
            raise ValueError(
                f"engine.transfer=ipc: each rank fills a buffer on its own GPU, and one worker there reads it, but here are {count} ranks on {nodes} "
                f"machines and {self.engine.num_gpus} workers (engine.replicas x engine.tensor_parallel): make them as many, on one machine, or use "
                "engine.transfer=shared_memory (or auto)"
            )
        if nodes > 1 and self.engine.kind == "vllm" and not self.ray.address:
            raise ValueError("engine=vllm on several machines needs a Ray cluster over them: ray.address=HOST:PORT (or auto), or engine=torch")
        if count > 1 and self.track.bundle_steps:
            raise ValueError("track.bundle_steps records the step of one learner process: use learner.ranks=1, or track.bundle_steps=[]")
        if self.rollout.prompts % count:
            fits = [n for n in range(1, self.rollout.prompts + 1) if self.rollout.prompts % n == 0 and n % nodes == 0]
            ranks = ", ".join(str(n // nodes) for n in fits) or "none"
            raise ValueError(
                f"rollout.prompts is {self.rollout.prompts}, which {count} ranks cannot share evenly (each owns whole groups): use rollout.prompts="
                f"{-(-self.rollout.prompts // count) * count}, or learner.ranks from {ranks}"
            )
        if nodes > 1 and not re.fullmatch(r"[^\s:/]+:[0-9]{1,5}", self.launch.master):
            raise ValueError(f"launch.nodes is {nodes}: every machine needs launch.master=HOST:PORT of machine 0, e.g. launch.master=10.0.0.1:29500")
        if self.launch.node_rank >= nodes:
            raise ValueError(f"launch.node_rank is {self.launch.node_rank}, but with launch.nodes={nodes} they go from 0 to {nodes - 1}")
        return self

    @model_validator(mode="after")
    def _spending_fits(self) -> "Recipe":
        check_profile(self.profile, self.steps)
        check_spending(self.budget, self.prices, has_teacher=bool(self.signals), has_writers=bool(self.writers))
        return self
