import gc
import weakref

import pytest

import opd
from opd.run.heap import settled_heap
from opd.tasks import TASKS


class Node:
    pass


def test_garbage_of_the_run_is_found_and_the_rest_let_go_afterwards():
    with pytest.raises(KeyError), settled_heap():
        assert gc.get_freeze_count() > 10_000
        node = Node()
        node.itself, seen = node, weakref.ref(node)
        del node
        gc.collect()
        assert seen() is None
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_a_run_settles_the_heap_and_leaves_it_as_it_was(tmp_path):
    seen = []

    def verify(prompt, text):
        seen.append(gc.get_freeze_count())
        return TASKS["expr"].verify(prompt, text)

    settings = {"steps": 1, "rollout.prompts": 2, "group": 2, "sampling.max_tokens": 8, "eval.num_problems": 0, "eval.final_problems": 0}
    opd.train("recipes/runs/grpo_expr.yaml", {**settings, "track.wandb": "disabled"}, folder=tmp_path / "run", verifier=verify)
    assert seen and min(seen) > 10_000
    assert gc.get_freeze_count() == 0
