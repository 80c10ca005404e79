"""A run over several machines, here two launchers on one: they start, end and start again together."""

import json
import os
import signal
import socket
import threading
import time

import pytest
import yaml
from pytest import approx

from opd.config.load import parse_recipe
from opd.errors import Preempted, RunFailed
from opd.launcher.driver import interface_of
from opd.launcher.machines import Alone, Line, free_port, interface_to, joint, machines_of, master_address
from opd.launcher.watch import End
from tests.run.launched import TINY, finish, kill, lines, opd, start, status, survivors, wait_for


def never() -> int:
    return 0


def together(port: int) -> list[str]:
    return ["launch.nodes=2", f"launch.master=127.0.0.1:{port}"]


def recipe_of(number: int, port: int, *words: str):
    return parse_recipe(TINY, [*together(port), f"launch.node_rank={number}", "launch.deadline_seconds=20", *words])


def ranks_of(launcher: int) -> list[int]:
    """Rank processes of a launcher."""
    found = []
    for task in os.listdir(f"/proc/{launcher}/task"):
        with open(f"/proc/{launcher}/task/{task}/children") as children:
            found += [int(child) for child in children.read().split()]
    return [pid for pid in found if "opd.launcher.beacon" in open(f"/proc/{pid}/cmdline").read()]


@pytest.mark.slow
def test_two_machines_train_as_one_with_two_ranks_and_start_again_together_after_a_kill(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**TINY, "steps": 16, "checkpoint": {"every": 2}}))
    code, said = opd(tmp_path, "train", "r.yaml", "name=one", "learner.ranks=2")
    assert code == 0, said
    words = ["train", "r.yaml", "name=two", *together(free_port("127.0.0.1"))]
    others = start(tmp_path, *words, "launch.node_rank=1")
    first = start(tmp_path, *words, "launch.node_rank=0")
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    wait_for(lambda: len(lines(two / "metrics.jsonl")) >= 4)
    kill(ranks_of(others.pid)[0])
    for process in (first, others):
        code, said = finish(process, tmp_path)
        assert code == 0, said
    assert said.count("opd: machine 1: rank 1 was killed by SIGKILL") == 2, said  # both launchers say why they start again
    assert (status(two)["state"], status(two)["restarts"]) == ("finished", 1)
    for alone, shared in zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
        assert {name: value for name, value in shared.items() if "seconds" not in name and "rate" not in name} == approx(
            {name: value for name, value in alone.items() if "seconds" not in name and "rate" not in name}, nan_ok=True
        )
    assert (one / "model/model.safetensors").read_bytes() == (two / "model/model.safetensors").read_bytes()
    assert survivors(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "number", "codes", "sentence"),
    [
        (1, signal.SIGKILL, {0: 1, 1: -9}, "machine 1's launcher is gone"),
        (0, signal.SIGKILL, {0: -9, 1: 1}, "machine 0's launcher is gone"),
        (1, signal.SIGTERM, {0: 0, 1: 0}, "preempted (SIGTERM)"),
    ],
)
def test_a_launcher_that_ends_ends_the_others_and_the_same_commands_go_on(tmp_path, machine, number, codes, sentence):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**TINY, "steps": 400, "eval": {"every": 0, "num_problems": 2, "final_problems": 0}}))
    words = ["train", "r.yaml", "name=run", *together(free_port("127.0.0.1"))]
    launchers = [start(tmp_path, *words, f"launch.node_rank={node}") for node in (0, 1)]
    wait_for(lambda: len(lines(tmp_path / "runs/run/metrics.jsonl")) >= 3)
    launchers[machine].send_signal(number)
    found = {node: finish(process, tmp_path)[0] for node, process in enumerate(launchers)}
    said = (tmp_path / "said").read_text()
    assert found == codes and sentence in said, said
    assert survivors(tmp_path) == []
    saved = len(lines(tmp_path / "runs/run/metrics.jsonl"))
    again = [start(tmp_path, *words, f"launch.node_rank={node}") for node in (0, 1)]
    wait_for(lambda: "resumed after step" in (tmp_path / "said").read_text())
    wait_for(lambda: len(lines(tmp_path / "runs/run/metrics.jsonl")) > saved)
    again[0].send_signal(signal.SIGINT)
    assert {finish(process, tmp_path)[0] for process in again} <= {0, 130}
    assert survivors(tmp_path) == []


def test_a_stop_while_another_machine_is_awaited_ends_at_once(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    process = start(tmp_path, "train", "r.yaml", "name=run", *together(free_port("127.0.0.1")))
    wait_for(lambda: "waiting for machine 1" in (tmp_path / "said").read_text())
    process.send_signal(signal.SIGTERM)
    code, said = finish(process, tmp_path)
    assert code == 0 and "preempted (SIGTERM) while waiting for other machines" in said
    assert not (tmp_path / "runs").exists() and survivors(tmp_path) == []


class Both:
    """Two launchers' lines in two threads."""

    def __init__(self, *words: str, port: int | None = None) -> None:
        self.port = port or free_port("127.0.0.1")
        self.recipes = recipe_of(0, self.port), recipe_of(1, self.port, *words)

    def run(self, *acts):
        """What act(machine) of machine 0 and 1 gave, or raised."""
        found: dict[int, object] = {}

        def live(number):
            try:
                with machines_of(self.recipes[number]) as machine:
                    found[number] = acts[number](machine)
            except (ValueError, RunFailed) as error:
                found[number] = error

        threads = [threading.Thread(target=live, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return found[0], found[1]


def test_machines_meet_at_a_new_place_in_every_attempt_and_decide_as_machine_0_does(tmp_path):
    def first(machine):
        places = [machine.gather(tmp_path, never)]
        ended = machine.agree(End(kind="finished", text="x"), may_restart=True)
        places.append(machine.gather(tmp_path, never))
        return places, ended, machine.agree(End(kind="finished", text="done"), may_restart=True)

    def second(machine):
        places = [machine.gather(tmp_path, never)]
        ended = machine.agree(End(kind="lost", text="rank 1 died", restartable=True), may_restart=False)
        places.append(machine.gather(tmp_path, never))
        return places, ended, machine.agree(End(kind="finished", text="done"), may_restart=False)

    here, there = Both().run(first, second)
    assert here == there and here[0][0] != here[0][1]
    assert all(place.startswith("tcp://127.0.0.1:") for place in here[0])
    assert here[1] == (End(kind="lost", text="machine 1: rank 1 died", restartable=True), True)
    assert here[2] == (End(kind="finished", text="done"), False)


def test_the_end_of_one_machine_is_seen_on_the_others(tmp_path):
    def first(machine):
        machine.gather(tmp_path, never)
        until = time.monotonic() + 20
        while (seen := machine.look()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return seen, machine.agree(End(kind="lost", text="rank 0 lost another rank", restartable=True, caused=True), may_restart=True)

    def second(machine):
        machine.gather(tmp_path, never)
        assert machine.look() is None
        return machine.agree(End(kind="failed", text="rank 1 failed: no such thing"), may_restart=True)

    (seen, agreed), (end, again) = Both().run(first, second)
    assert seen == end == agreed[0] == End(kind="failed", text="machine 1: rank 1 failed: no such thing")
    assert not agreed[1] and not again


def test_a_machine_that_has_finished_first_hurries_nobody(tmp_path):
    done = End(kind="finished", text="done")

    def first(machine):
        machine.gather(tmp_path, never)
        until = time.monotonic() + 1.0
        seen = [machine.look() for _ in iter(lambda: time.monotonic() < until, False)]
        return set(seen), machine.agree(done, may_restart=True)

    def second(machine):
        machine.gather(tmp_path, never)
        return machine.agree(done, may_restart=True)

    assert Both().run(first, second) == (({None}, (done, False)), (done, False))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimizer.lr=0.5"], "recipe is "),
        (["launch.nodes=3", "rollout.prompts=6"], "nodes is 3 there and 2 on machine 0"),
        (["learner.ranks=2"], "learner.ranks is 2 there and 1 on machine 0"),
    ],
)
def test_a_machine_of_another_run_is_sent_away_and_the_right_one_still_awaited(tmp_path, words, sentence):
    both = Both(*words)

    def first(machine):
        right = threading.Timer(1.0, lambda: Both(port=both.port).run(lambda _: None, lambda other: other.gather(tmp_path, never)))
        right.start()
        return machine.gather(tmp_path, never)

    here, there = both.run(first, lambda machine: machine.gather(tmp_path, never))
    assert isinstance(there, ValueError) and sentence in str(there) and "on every machine" in str(there)
    assert str(here).startswith("tcp://127.0.0.1:")


def test_a_stranger_on_the_port_is_not_taken_for_a_machine(tmp_path):
    def stray(port):
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"machine": 0}\n', b'{"machine": []}\n', b"\xff\n", b""):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
                link.sendall(words)
                link.shutdown(socket.SHUT_WR)
                link.settimeout(20)
                while link.recv(4096):
                    pass

    both = Both()

    def first(machine):  # listens by now
        strangers = threading.Thread(target=stray, args=(both.port,))
        strangers.start()
        place = machine.gather(tmp_path, never)
        strangers.join(timeout=60)
        return place, strangers.is_alive()

    def second(machine):
        time.sleep(1.0)
        return machine.gather(tmp_path, never)

    here, there = both.run(first, second)
    assert here == (there, False) and str(there).startswith("tcp://127.0.0.1:")


def test_nobody_is_awaited_for_ever(tmp_path):
    recipes = [recipe_of(number, free_port("127.0.0.1"), "launch.deadline_seconds=0.5") for number in (0, 1)]
    sentences = ("machine 1 did not come within launch.deadline_seconds=0.5", "machine 0 does not answer at 127.0.0.1:")
    for recipe, sentence in zip(recipes, sentences, strict=True):
        with machines_of(recipe) as machine, pytest.raises(RunFailed, match=sentence):
            machine.gather(tmp_path, never)
    with machines_of(recipes[0]) as machine, pytest.raises(Preempted, match=r"interrupted \(Ctrl-C\) while waiting"):
        machine.gather(tmp_path, lambda: signal.SIGINT)


def test_addresses_that_cannot_be_had_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match="cannot listen there .*; give a free port of machine 0"), machines_of(recipe_of(0, port)):
            pass
    with pytest.raises(ValueError, match="unknown host"):
        master_address("no-such-host.invalid:29500")
    with pytest.raises(ValueError, match="ports go from 1 to 65535"):
        master_address("127.0.0.1:70000")


def test_a_name_that_means_another_machine_on_each_is_refused(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(ValueError, match=r"head is 127\.0\.1\.1 here, where no other machine comes"):
        master_address("head:29500")
    assert master_address("localhost:29500") == ("127.0.1.1", 29500)


def test_gloo_is_told_the_interface_that_leads_to_machine_0(monkeypatch):
    assert interface_to("127.0.0.1") == "lo" == interface_of(recipe_of(0, 29500))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert interface_of(recipe_of(0, 29500)) == "ib0"
    assert interface_of(parse_recipe(TINY)) == "lo"  # ranks of one machine never leave it


def test_what_explains_the_other_ends_is_the_end():
    caused = End(kind="lost", text="rank 0 lost another rank", restartable=True, caused=True)
    killed = End(kind="lost", text="rank 1 was killed", restartable=True)
    done = End(kind="finished", text="done")
    assert joint([caused, killed, done]) == killed
    assert joint([done, done]) == done
    assert joint([killed, End(kind="input", text="no such file")]).kind == "input"
    assert joint([killed, End(kind="preempted")]).kind == "preempted"


def test_one_machine_alone_meets_in_a_file(tmp_path):
    end = End(kind="lost", text="x", restartable=True)
    alone = Alone()
    assert alone.gather(tmp_path, never) == f"file://{tmp_path}/rendezvous" and alone.look() is None
    assert alone.agree(end, True) == (end, True) and alone.agree(end, False) == (end, False)


def test_a_line_takes_no_message_without_an_end():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5) as near:
        far, _ = server.accept()
        line = Line(far)
        near.sendall(json.dumps({"a": 1}).encode())
        assert line.hear(0.05) is None and not line.closed
        near.sendall(b"\n{")
        assert line.hear(1.0) == {"a": 1}
        near.sendall(b"x" * (1 << 21))
        assert line.hear(5.0) is None and line.closed
        line.close()

