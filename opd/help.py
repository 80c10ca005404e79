"""The pages of `opd help`, `opd COMMAND --help` and `opd --version`."""

from opd import __version__
from opd.run.machine import git_commit

USAGE = """usage: opd COMMAND [NAME] [key=value ...]

  train   RECIPE       one run -> runs/<name>/ (the same command again resumes)
  check   RECIPE       in seconds, without weights or a GPU: what is wrong, how much memory and time it will take (device=h100)
  compare COMPARISON   several arms x seeds under one budget -> runs/<name>/report.html
  eval    MODEL_OR_RUN avg@k, pass@k, maj@k with intervals: a run's own problems, data.path=FILE or suite=aime24; server=http://...:8000/v1
  inspect RUN          token-level viewer -> <run>/inspect.html; other=RUN lays a second run beside it
  diff    RUN_A RUN_B  every difference between two runs, and which of them can explain a gap in results
  ledger  RUN          tokens, seconds by role, energy and money that it spent; device_hour=2.5 watts=300 puts prices on them
  import  trl|wandb SRC a run made elsewhere becomes a run folder that compare and diff read: name=NAME seed=N generations=FILE
  doctor  RUN          where the seconds went, who waited for whom, whether asynchrony would help
  diagnose RECIPE      which teacher and view suit the student, before any training -> runs/diagnose-.../diagnosis.html
  bundle  RUN step=N   one step's rollouts, scores and weights in a file -> <run>/bundles/
  replay  BUNDLE       that step again, bit by bit; with objective=... another objective on the same rollouts
  simulate RUN         what its steps would take elsewhere: replicas=2 staleness=1 learner_speed=4 smaller=RUN2
  score   RECIPE       a fixed teacher's scores of the data's answers -> scores/RECIPE.sqlite; training then needs no teacher
  publish RUN          weights (adapters merged), tokenizer and a model card -> <run>/published; repo=OWNER/NAME pushes it to the hub
  show    [RECIPE]     the recipe with every default filled in; alone: lists recipes, methods and runs

`opd COMMAND --help` explains a command and its keys; `opd --version` names this version.

examples: opd train recipes/runs/opsd_expr.yaml optimizer.lr=3e-4 seed=1
          opd compare recipes/compare/demo.yaml
"""
_KEYS = """  Any key of a recipe, dotted, value as YAML; docs/recipe_reference.md has all of them. Often changed:
    name=NAME                 the folder, runs/NAME
    steps=200 seed=1          how long; which random numbers
    optimizer.lr=3e-4         learning rate
    rollout.prompts=32        prompts a step
    group=8                   answers a prompt
    sampling.max_tokens=512   longest answer
    model.path=FOLDER         the student; model.lora='{rank: 8}' trains adapters only
    data.path=FILE.jsonl      questions and answers; data.task=expr for an embedded task
    teacher=frozen view=facts who scores the student's tokens, and what only the teacher sees
    eval.every=20             steps between evaluations
    track.wandb=disabled      auto | online | offline | disabled
    learner.ranks=2           learner processes; engine=torch | process | vllm
"""
PAGES = {
    "train": f"""usage: opd train RECIPE [key=value ...]

One run -> runs/<name>/. The same command again resumes it, wherever it stopped. RECIPE is a file or a name of `opd show`.

{_KEYS}
example: opd train opsd_expr name=tour optimizer.lr=3e-4 seed=1
""",
    "check": f"""usage: opd check RECIPE [device=h100] [key=value ...]

In seconds, without weights or a GPU: what is wrong with a recipe, how much memory and time it will take. Exit status 2 where it would not run.
Of a comparison: every arm, and the time of all runs together.

  device=h100                 plan for a100, h100, h200 or l40s instead of this machine's CPU
{_KEYS}
example: opd check opsd_qwen3_1.7b_math device=h100
""",
    "compare": """usage: opd compare COMPARISON [key=value ...]

Arms x seeds under one budget -> runs/<name>/report.html. The same command again does only what is missing.

  name=NAME                   the folder, runs/NAME
  seeds=[0,1,2]               seeds of the reported runs
  budget.generated_tokens=N   what every run may spend; or budget.steps, budget.seconds
  baseline=ARM                whom the others are compared with
  target=0.8                  dev accuracy whose cost is compared
  workers=2                   single-threaded processes
  tune.grid={...}             dotted recipe key -> values, one grid for every arm
  arms.NAME={recipe: ..., set: {key: value}}   another arm

example: opd compare recipes/compare/demo.yaml seeds=[0,1,2,3,4] name=five
""",
    "eval": """usage: opd eval MODEL_OR_RUN [key=value ...]

avg@k, pass@k and maj@k with 95 % intervals: a run on its own test problems, or a model on what you name. Generations are kept.

  split=test                  train | dev | test of the recipe's own problems
  data.path=FILE.jsonl        other problems; data.task=expr, data.preset=gsm8k
  suite=aime24                a public suite, or several: suite=[aime24,math500]
  suite.path suite.subset suite.split suite.problems suite.samples suite.sampling suite.thinking suite.temperature suite.top_p suite.top_k
  suite.max_tokens            of the suite; empty: what it publishes
  server=http://HOST:8000/v1  answers come from a server that speaks OpenAI's completions
  out=FOLDER                  where rows and generations go

example: opd eval runs/tour eval.temperatures=[1,0]
""",
    "inspect": """usage: opd inspect RUN [other=RUN]

Every recorded token, coloured by what the teacher thought of it -> RUN/inspect.html.

  other=RUN                   lay a second run beside it -> RUN/inspect-with-OTHER.html

example: opd inspect runs/tour
""",
    "diff": """usage: opd diff RUN_A RUN_B

Every difference between two runs, and which of them can explain a gap in results. No keys.

example: opd diff runs/tour runs/tour-grpo
""",
    "ledger": """usage: opd ledger RUN [key=value ...]

Tokens, seconds by role, energy and money that a run spent -> RUN/ledger.json.

  device_hour=2.5             price of a device for an hour
  watts=300                   power of a device, for energy
  devices=8                   how many, where the run did not record it
  currency=EUR                as the figures call it

example: opd ledger runs/tour device_hour=2.5 watts=300
""",
    "doctor": """usage: opd doctor RUN

Where the seconds went, who waited for whom, and whether asynchrony would help -> RUN/doctor.json. No keys.

example: opd doctor runs/tour
""",
    "diagnose": """usage: opd diagnose RECIPE [diagnose.key=value ...] [key=value ...]

Before any training: which teacher and view point towards success, and how sure that is -> runs/diagnose-.../diagnosis.html.

  diagnose.problems=32        questions
  diagnose.rollouts=8         answers a question
  diagnose.nodes=6            prefixes a question at which gradients are compared
  diagnose.branches=16        continuations of each tried token, where success is sampled
  diagnose.success=auto       auto | exact | sampled
  diagnose.candidates={...}   teachers to compare, name -> {weights, view}
  and any key of the recipe

example: opd diagnose opsd_expr diagnose.problems=16
""",
    "bundle": """usage: opd bundle RUN step=N [weights=false]

One step's rollouts, scores and weights in a file -> RUN/bundles/step-N.safetensors.

  step=N                      a step that the run has done
  weights=false               leave the weights out: smaller, but the update cannot be done again

example: opd bundle runs/tour step=12
""",
    "replay": """usage: opd replay BUNDLE [key=value ...]

That step again, bit by bit; exit status 1 where other bits came out.

  objective=[...]             another objective on the same rollouts
  method=NAME                 the objective of a method
  optimizer.lr=1e-4           also optimizer.clip, updates, learner.token_budget, learner.packed, learner.chunk_bytes

example: opd replay runs/tour/bundles/step-000002.safetensors
""",
    "simulate": """usage: opd simulate RUN [key=value ...]

What a run's steps would take elsewhere, from its own measurements.

  replicas=2                  rollout engines
  staleness=1                 steps that answers may be older than the weights
  learner_speed=4             times as fast
  teacher_apart=true          the teacher on devices of its own
  smaller=RUN2                the same with fewer prompts: tells what replicas cannot share
  fixed_share=0.1             or that share, given

example: opd simulate runs/tour replicas=2 staleness=1
""",
    "import": """usage: opd import trl|wandb SOURCE name=NAME [key=value ...]

A run made elsewhere becomes a run folder, runs/NAME, that opd compare and opd diff read. SOURCE is TRL's output folder, or a W&B export
(csv, json, jsonl) or offline file. docs/comparing.md says which curves are read under which names.

  name=NAME seed=0            the folder, and the run's seed
  completions=N               answers a step, where the curves hold only their mean length
  generations=FILE            judged answers to the test problems, at temperature 1; greedy=FILE at temperature 0
  config=FILE model=PATH      its settings, for opd diff

example: opd import trl outputs/grpo name=trl-grpo completions=32
""",
    "score": """usage: opd score RECIPE [key=value ...]

A fixed teacher's scores of the data's answers, written once -> scores/RECIPE.sqlite. Training with that file needs no teacher, and checks a few
scores against the live one first. Every key of a recipe works.

example: opd score seq_kd data.path=FILE.jsonl
""",
    "publish": """usage: opd publish RUN [key=value ...]

Weights with adapters merged, tokenizer and a model card made from the run's record -> RUN/published.

  out=FOLDER                  elsewhere
  adapter=true                of a LoRA run the adapters alone; else they are merged into the weights
  repo=OWNER/NAME             pushes it to the hub too; private=true is the default

example: opd publish runs/tour
""",
    "show": """usage: opd show [RECIPE] [key=value ...]

Alone: recipes, methods, comparisons, and the runs of this folder with their state. With a recipe: every default filled in, as YAML.

example: opd show opsd_expr teacher=live
""",
}


def version() -> str:
    """`opd VERSION (commit)`, the commit where it is known."""
    commit = git_commit()
    return f"opd {__version__}" + (f" (commit {commit[:12]})" if commit else "")
