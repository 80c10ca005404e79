"""What a bundle needs of a step that only exists while it happens: the weights before it, the teachers' heads and hidden states.

Legend: T completion tokens of an answer, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from opd_kernels import HeadView
from opd_rollout.types import ScoreRequest, TokenScores
from torch import Tensor

from opd.build.student import pad_id
from opd.build.system import Parts
from opd.config.recipe import Recipe
from opd.learner.learner import PolicyLearner
from opd.loop import Views
from opd.replaying.bundle import Bundle, Outcome, weights_name, write_bundle
from opd.run.machine import environment
from opd.types import Judged, Meter, Prepared, Sample, StepReport

HIDDEN_MEBIBYTES = 64  # up to here a bundle also holds the teachers' hidden states and heads, so that every objective can be replayed


class Recorder:
    """Passes scores on (opd.loop.TeacherScorer) and keeps what a bundle needs of the steps that are wanted.

    last: the system's metrics, read before the step. weights: false keeps their name alone, as does a learner whose optimiser is in pieces.
    wanted: whether the step that is under way is.
    """

    def __init__(self, parts: Parts, last: Mapping[str, float], *, weights: bool, wanted: Callable[[], bool]) -> None:
        assert isinstance(parts.learner, PolicyLearner)
        self._parts, self._learner, self._last, self._weights, self._wanted = parts, parts.learner, last, weights, wanted
        self._kept: dict[str, Any] = {}

    def score(
        self, judged: Sequence[Judged], views: Views, prepared: Sequence[Prepared | None], only: Collection[str] | None = None
    ) -> list[Mapping[str, TokenScores]]:
        scorer = self._parts.scorer
        found = scorer.score(judged, views, prepared, only)
        self._meters, self._kept = dict(scorer.meters()), {}
        if self._wanted():
            self._keep(judged, views)
        return found

    def _keep(self, judged: Sequence[Judged], views: Views) -> None:
        """The state before the update, as copies."""
        learner = self._learner
        state = copied_tensors(learner.state()) if self._weights and learner.whole else {}
        trained = {name.removeprefix("model.") for name in state["masters"]} if state else set()
        named = {name: parameter.detach().clone() for name, parameter in learner.policy.model.named_parameters()}
        self._kept = {
            "last": dict(self._last),
            "learner": state,
            "frozen": {name: tensor for name, tensor in named.items() if state and name not in trained},
            "before": weights_name(named),
            "views": {name: list(contexts) for name, contexts in views.items()},
            "hidden": {},
            "heads": {},
        }
        for name, weights in self._parts.scorer.weights.items():
            if weights.head is not None and name in views:
                self._keep_hidden(name, judged, views[name])

    def _keep_hidden(self, name: str, judged: Sequence[Judged], contexts: Sequence[tuple[int, ...] | None]) -> None:
        weights = self._parts.scorer.weights[name]
        assert weights.head is not None
        head = weights.head()
        num_tokens = sum(len(one.completion.token_ids) for one in judged)
        if (head.weight.numel() + num_tokens * head.weight.shape[1]) * head.weight.element_size() > HIDDEN_MEBIBYTES << 20:
            return
        chosen = [n for n, context in enumerate(contexts) if context is not None and judged[n].completion.token_ids]
        requests = [ScoreRequest(context_ids=contexts[n] or (), completion_ids=judged[n].completion.token_ids, hidden=True) for n in chosen]
        scores = dict(zip(chosen, weights.scores(requests), strict=True))
        self._kept["hidden"][name] = [scores[n].hidden if n in scores else None for n in range(len(judged))]
        self._kept["heads"][name] = copied(head)

    def heads(self) -> Mapping[str, HeadView]:
        heads = self._parts.scorer.heads()
        if self._kept:
            self._kept["heads"] |= {name: copied(head) for name, head in heads.items()}
        return heads

    def meters(self) -> Mapping[str, Meter]:
        return self._meters

    def bundle(self, run: str, recipe: Recipe, report: StepReport, samples: Sequence[Sample], *, equals_run: bool) -> Bundle:
        """The step that was just done, as a bundle."""
        model = self._learner.policy.model
        return Bundle(
            run=run,
            step=report.step + 1,
            recipe=recipe.model_dump(mode="json"),
            config=model.config.to_json_string(use_diff=False),
            vocab_size=len(self._parts.tokenizer),
            pad_id=pad_id(self._parts.tokenizer),
            samples=samples,
            outcome=Outcome(meters=report.meters, skipped=report.skipped, weights=weights_name(dict(model.named_parameters()))),
            equals_run=equals_run,
            threads=torch.get_num_threads(),
            packages=environment()["packages"],
            **self._kept,
        )

    def write(self, folder: Path, recipe: Recipe, report: StepReport, samples: Sequence[Sample]) -> Path | None:
        """Write the step that was just done into the run folder, if it was wanted."""
        if not self._kept:
            return None
        path = bundle_path(folder, report.step + 1)
        write_bundle(path, self.bundle(folder.name, recipe, report, samples, equals_run=True))
        self._kept = {}
        return path


def bundle_path(folder: Path, step: int) -> Path:
    """Where the bundle of a run's step lies."""
    return folder / "bundles" / f"step-{step:06d}.safetensors"


def copied(head: HeadView) -> HeadView:
    """The head with tensors of its own: a live one moves with the coming update."""
    return replace(head, weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())


def copied_tensors(value: Any) -> Any:
    """A nest of mappings and sequences with every tensor copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied_tensors(item) for key, item in value.items()}
    return [copied_tensors(item) for item in value] if isinstance(value, list | tuple) else value
