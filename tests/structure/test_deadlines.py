"""Every wait has a deadline: a call that may wait for ever fails here unless it is named below with the reason why it cannot."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "opd", ROOT / "rollout/opd_rollout")
METHODS = {"get", "join", "wait", "result", "recv", "recv_bytes", "readline", "acquire", "communicate", "select", "poll", "shutdown", "exception"}
FUNCTIONS = {  # wait, unless told how long
    "ray.get", "ray.wait", "os.wait", "os.waitpid", "subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output",
    "wait", "as_completed", "urlopen", "urllib.request.urlopen", "socket.create_connection", "dist.init_process_group", "dist.new_group",
    "dist.monitored_barrier",
}  # fmt: skip
POSITIONAL = {"select.select": 4, "wait": 2}  # how many positional arguments hold a deadline
EXCEPTIONS = {  # (file, call): why it ends all the same
    ("opd/api.py", "ranks.wait()"): "an exchange of all ranks: the process group has launch.deadline_seconds",
    ("opd/run/training.py", "self.ranks.wait()"): "an exchange of all ranks",
    ("opd/ahead.py", "self._begun.pop(step).result()"): "done: waited for a line before, where a stop is noticed",
    ("opd/ahead.py", "future.result()"): "done: only futures that say so are asked",
    ("opd/ahead.py", "future.exception()"): "done: only futures that say so are asked",
    ("opd/run/folder.py", "wait()"): "given by the caller: an exchange of all ranks",
    ("opd/ahead.py", "self._pool.shutdown(wait=self._ranks.count == 1, cancel_futures=True)"): "the engine is closed first, which ends its waits",
    ("opd/launcher/beacon.py", "self._lines.readline()"): "the launcher sends its order with the start, and its end closes the socket",
    ("opd/comparison/workers.py", "connection.recv()"): "an idle worker waits for its next job; its parent's end closes the pipe",
    ("opd/comparison/workers.py", "self.connection.recv()"): "after poll: the answer is there",
    ("opd/verify/deadline.py", "calls.get()"): "an idle thread waits for work; its owner's end sends it away, and no process waits for it",
    ("opd/verify/math_servers.py", "link.recv(65536)"): "asked only where select says that something is there",
    ("opd/verify/math_worker.py", "control.recv(NUMBER.size, socket.MSG_WAITALL)"): "an idle worker waits for work; its parent's end closes it",
    ("opd/verify/math_worker.py", "os.waitpid(old, 0)"): "of a server that its user has killed",
    ("opd/verify/sandbox_child.py", "os.wait()"): "the sandbox's own init; whoever asked kills it at its deadline",
    ("rollout/opd_rollout/process_engine.py", "self._pipe.recv_bytes()"): "after poll: the answer is there",
    ("rollout/opd_rollout/process_engine.py", "pipe.recv_bytes()"): "the child waits for its next call; its parent's end closes the pipe",
    ("rollout/opd_rollout/process_engine.py", "lifeline.poll(None)"): "the child's watch over its parent, in a thread of its own",
    ("rollout/opd_rollout/replicas.py", "future.result()"): "a call of another engine, which has deadlines of its own",
    ("rollout/opd_rollout/replicas.py", "self._pool.shutdown()"): "the engines are closed first, which ends their calls",
    ("rollout/opd_rollout/server_engine.py", "answer.result()"): "HTTP requests with a timeout each, tried a few times",
    ("rollout/opd_rollout/vllm_runner.py", "self._thread.submit(lambda: LLM(disable_log_stats=True, **options)).result()"): (
        "in the actor; the pool restarts an actor that does not open within engine.deadline_seconds"
    ),
    ("rollout/opd_rollout/vllm_actor.py", "self._changing.acquire()"): "whoever asks has engine.deadline_seconds",
    ("rollout/opd_rollout/vllm_cluster.py", "link.recv(9)"): "the socket has the timeout that it was connected with",
    ("rollout/opd_rollout/vllm_cluster.py", "ray.shutdown()"): "Ray ends its own daemons by signal within seconds",
    ("opd/launcher/machines.py", "self._link.recv(1 << 16)"): "asked only where select says that something is there",
    ("opd/launcher/watch.py", "self.link.recv(1 << 16)"): "a socket that does not block",
}


def waits(tree: ast.AST) -> list[str]:
    """Calls that may wait without a deadline, as text."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        told = any(word.arg is not None and "timeout" in word.arg for word in node.keywords)
        limit = POSITIONAL.get(name, 99)
        if name in FUNCTIONS or name == "select.select":
            is_bare = not told and len(node.args) < limit and "WNOHANG" not in ast.unparse(node)
        elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            is_bare = not told and is_without(node)
        else:
            is_bare = False
        if is_bare:
            found.append(ast.unparse(node))
    return found


def is_without(call: ast.Call) -> bool:
    """Whether a method that may wait is given nothing that could be its deadline."""
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr in ("recv", "shutdown"):
        return True  # its argument is a size, or whether to wait
    if call.func.attr == "poll":
        return any(isinstance(one, ast.Constant) and one.value is None for one in call.args)  # without an argument it does not wait
    return not call.args


def all_waits() -> set[tuple[str, str]]:
    found = set()
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            found |= {(str(path.relative_to(ROOT)), call) for call in waits(ast.parse(path.read_text()))}
    return found


def test_every_wait_has_a_deadline_or_a_reason():
    bare = sorted(all_waits() - set(EXCEPTIONS))
    assert not bare, f"these may wait for ever: {bare}; give each a timeout and an error that says what waited for what"


def test_no_reason_outlives_its_wait():
    assert set(EXCEPTIONS) <= all_waits(), "remove what is gone"


@pytest.mark.parametrize(
    "bare",
    ["ray.get(reference)", "ray.wait(references)", "thread.join()", "event.wait()", "queue.get()", "future.result()", "process.communicate()",
     "lock.acquire()", "subprocess.run(['git'])", "connection.recv()", "dist.init_process_group('gloo')", "pipe.poll(None)", "wait(futures)",
     "os.waitpid(pid, 0)"],
)  # fmt: skip
def test_a_bare_wait_is_seen(bare):
    assert waits(ast.parse(bare)) == [ast.unparse(ast.parse(bare))]


@pytest.mark.parametrize(
    "bounded",
    ["ray.get(reference, timeout=1)", "ray.wait(references, timeout=1)", "thread.join(5)", "event.wait(0.1)", "table.get(key)", "', '.join(words)",
     "process.poll()", "subprocess.run(['git'], timeout=10)", "os.waitpid(pid, os.WNOHANG)", "dist.init_process_group('gloo', timeout=limit)"],
)  # fmt: skip
def test_a_bounded_one_is_not(bounded):
    assert waits(ast.parse(bounded)) == []
