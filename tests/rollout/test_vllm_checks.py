"""What vLLM and Ray lack or cannot do is said in one sentence before anything starts; no engine is opened here."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import ray
from opd_rollout import vllm_cluster
from opd_rollout.vllm_cluster import ActorPlan, check_given, check_installed, check_nodes, check_resources, find_cluster
from opd_rollout.vllm_types import Place
from transformers import AutoTokenizer, Qwen3Config

from opd.build import actors, devices, system
from opd.build.actors import check_placement, check_served, learner_gpus, plans
from opd.build.spending import num_devices
from opd.build.student import room_for_prompts, smallest_room
from opd.build.transfers import check_shared_gpu, chosen_transfer, moment_bytes
from opd.config.load import load_recipe, parse_recipe
from opd.objective.terms import SignalNeeds
from opd.preflight.report import examine

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes/runs/opsd_expr.yaml")
BASE = str(ROOT / "models/expr-base")


def recipe(**changes):
    return load_recipe(RECIPE, {"engine.kind": "vllm", "model.path": BASE, **changes})


def served_by(**more):
    return {"external": {"path": BASE, "engine": "vllm", **more}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"engine.placement": "colocated"}, "here is none: use engine.placement=separate"),
        ({"engine.transfer": "nccl"}, "from GPU to GPU, and here is none: use engine.transfer=shared_memory, or auto"),
        ({"engine.transfer": "ipc", "engine.placement": "colocated"}, "here is none: use engine.placement=separate"),
        ({"engine.exchange": "/nowhere"}, "/nowhere is no folder; name one in memory"),
    ],
)
def test_what_the_machine_lacks(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_placement(recipe(**change))


@pytest.mark.parametrize("change", [{"engine.transfer": "nccl"}, {"engine.placement": "colocated"}])
def test_a_learner_that_is_kept_on_the_cpu_cannot_send_from_its_gpu(change, monkeypatch):
    monkeypatch.setattr(actors.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match="^DS_ACCELERATOR=cpu keeps the learner off the GPUs.*: unset it, or use engine.transfer=shared_memory"):
        check_placement(recipe(**change))
    check_placement(recipe())
    monkeypatch.delenv("DS_ACCELERATOR")
    check_placement(recipe(**change))


@pytest.mark.parametrize("missing", [["ray"], ["vllm"], ["ray", "vllm"]])
def test_a_missing_package_names_the_extra_that_has_it(monkeypatch, missing):
    monkeypatch.setattr(system, "find_spec", lambda name: None if name in missing else True)
    with pytest.raises(ValueError, match=f"engine=vllm needs {' and '.join(missing)}, .*opd-train\\[gpu\\].*opd-train\\[cpu\\]"):
        system.actors_of(recipe())


@pytest.mark.parametrize(
    ("vllm", "sentence"),
    [("0.26.1", "vLLM 0.26.1 is installed, .* from 0.27 up to, not including, 0.33"), ("0.33.0", "vLLM 0.33.0"), (None, "needs vllm, which is not")],
)
def test_a_version_outside_the_tested_range(monkeypatch, vllm, sentence):
    def version(name):
        if name == "ray" or (name == "vllm" and vllm):
            return "2.60.0" if name == "ray" else vllm
        raise PackageNotFoundError(name)

    monkeypatch.setattr(vllm_cluster, "version", version)
    with pytest.raises(ValueError, match=sentence):
        check_installed()
    vllm = "0.32.0"
    check_installed()


def test_what_a_cluster_lacks_is_counted():
    offered = {"GPU": 3.0, "CPU": 8.0}
    student, teacher = ActorPlan(role="student", replicas=2, gpus=2), ActorPlan(role="main", gpus=1)
    with pytest.raises(ValueError) as refused:
        check_resources([student, teacher], offered, 0, "auto")
    said = "the Ray cluster at auto offers 3 free GPUs, and this run needs 5 for the actors (student 2 x 2, main 1 x 1): 2 are missing."
    assert said in str(refused.value)
    with pytest.raises(ValueError, match="this machine offers 3 free GPUs, .* 2 for the actors .* and 2 for the learner: 1 are missing"):
        check_resources([ActorPlan(role="student", replicas=2, gpus=1)], offered, 2, "")
    check_resources([ActorPlan(role="student", replicas=2, gpus=1)], offered, 1, "")
    with pytest.raises(ValueError, match="offers 1 free CPUs, and 2 actors need one each"):
        check_resources([ActorPlan(role="student", replicas=2)], {"CPU": 1.0}, 0, "auto")


def test_an_actor_whose_gpus_no_one_machine_has_is_refused():
    """Ray would keep it waiting without a word: 8 GPUs are free, but not 4 at one place."""
    wide, teacher = ActorPlan(role="student", replicas=2, gpus=4), ActorPlan(role="main", gpus=1)
    check_nodes([teacher, wide], [4, 5, 0], "auto")
    said = "each of the 2 student actors wants 4 GPUs of one machine, and the machines of the Ray cluster at auto have 4, 3, 1 free: lower"
    with pytest.raises(ValueError, match=said):
        check_nodes([teacher, wide], [4, 3, 1], "auto")
    with pytest.raises(ValueError, match="each of the 1 main actors wants 1 GPUs of one machine"):
        check_nodes([wide, teacher], [4, 4], "auto")
    shared = ActorPlan(role="student", replicas=2, gpus=4, shared_gpus=("0,1,2,3", "4,5,6,7"))
    check_nodes([shared, ActorPlan(role="main")], [0], "auto")


def test_a_cluster_that_gives_out_the_learners_gpus_is_refused():
    away, here = Place(address="10.0.0.2", sees=True, is_open=False, gpus=("0", "1")), replace(HERE, gpus=("1", "2"))
    check_given([away, here, HERE], "10.0.0.1", ["0"])
    with pytest.raises(ValueError, match="the learner's GPU 1 of 10.0.0.1: start Ray there with CUDA_VISIBLE_DEVICES .* other than 0, 1, leave"):
        check_given([away, here, HERE], "10.0.0.1", ["0", "1"])


def test_auto_takes_no_cluster_by_chance(monkeypatch):
    running = ["127.0.0.1:1", "10.0.0.1:6379"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(vllm_cluster.services, "find_gcs_addresses", lambda: set(running))
    monkeypatch.setattr(vllm_cluster.services, "find_bootstrap_address", lambda folder: "10.0.0.1:6379")
    assert vllm_cluster._the_one_here() == "10.0.0.1:6379"  # what `ray start` started last
    running.remove("10.0.0.1:6379")
    assert vllm_cluster._the_one_here() == "127.0.0.1:1"  # that one is gone
    running.append("127.0.0.1:2")
    with pytest.raises(ValueError, match=r"ray.address=auto \(auto: on this machine run 127.0.0.1:1, 127.0.0.1:2: name one\); start a cluster"):
        find_cluster("auto")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    assert vllm_cluster._the_one_here() == "127.0.0.1:2"
    monkeypatch.delenv("RAY_ADDRESS")
    running.clear()
    with pytest.raises(ValueError, match=r"ray.address=auto \(auto: none runs on this machine\); start a cluster"):
        find_cluster("auto")


def test_the_actors_of_a_recipe():
    teachers = {"teacher": served_by(), "signals.other": {"weights": served_by(tensor_parallel=2)}}
    wanted = recipe(**{"engine.replicas": 2, "engine.tensor_parallel": 4, **teachers})
    found = plans(wanted, {"main": "a", "other": "b"}, tuple("0123456789a"))
    assert [(plan.role, plan.replicas, plan.gpus) for plan in found] == [("student", 2, 4), ("main", 1, 1), ("other", 1, 2)]
    assert num_devices(wanted) == 1 + 8 + 3
    assert [plan.gpus for plan in plans(wanted, {"other": "b"}, ())] == [0, 0]


@pytest.mark.parametrize("given", [{"engine": "torch", "tensor_parallel": 2}, *({"tensor_parallel": bad} for bad in (0, True, "2"))])
def test_gpus_that_share_a_teacher_are_counted_and_are_vllms(given):
    assert system.parse_weights("main", served_by(tensor_parallel=2)) == ("served", BASE)
    with pytest.raises(ValueError, match="signals.main: tensor_parallel is a whole number of GPUs.*that share a teacher with engine: vllm"):
        system.parse_weights("main", served_by(**given))


def colocated(**changes):
    return recipe(**{"engine.placement": "colocated", **changes})


def test_colocated_replicas_share_out_the_learners_gpus(monkeypatch):
    shared = colocated(**{"engine.replicas": 2, "engine.tensor_parallel": 2, "teacher": served_by()})
    [plan, teacher] = plans(shared, {"main": "a"}, ("4", "5", "6", "7", "9"))
    assert (plan.shared_gpus, teacher.shared_gpus, teacher.gpus) == (("4,5", "6,7"), (), 1)
    check_resources([plan, teacher], {"GPU": 5.0}, 4, "")  # those that share are not counted, and one is left for the teacher
    with pytest.raises(ValueError, match="2 replicas on 2 GPUs each need 4 GPUs, and here are 3: lower engine.replicas or engine.tensor_parallel"):
        plans(colocated(**{"engine.replicas": 2, "engine.tensor_parallel": 2}), {}, ("0", "1", "2"))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    eight = tuple("01234567")
    assert learner_gpus(recipe(**{"learner.ranks": 2}), eight) == 2
    assert learner_gpus(colocated(**{"engine.replicas": 2, "engine.tensor_parallel": 2}), eight) == 4
    assert learner_gpus(recipe(**{"learner.ranks": 2}), ("0",)) == 1
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert learner_gpus(recipe(**{"learner.ranks": 2}), eight) == 0


def test_a_cluster_that_is_started_here_gives_out_what_the_learner_leaves(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1f,7")
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 3)
    assert devices.visible_gpus() == ("3", "GPU-1f", "7")
    with vllm_cluster._sees_only(devices.visible_gpus()[1:]):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-1f,7"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-1f,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.visible_gpus() == ("0", "1", "2")
    with vllm_cluster._sees_only(()):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


HERE, AWAY = Place(address="10.0.0.1", sees=True, is_open=False), Place(address="10.0.0.2", sees=False, is_open=False)


@pytest.mark.parametrize(
    ("asked", "places", "way", "why"),
    [
        ("auto", [HERE, HERE], "shared_memory", "all actors see /dev/shm"),
        ("auto", [HERE, AWAY], "nccl", "the actors at 10.0.0.2 do not see the learner's /dev/shm"),
        ("shared_memory", [HERE], "shared_memory", "engine.transfer=shared_memory"),
        ("nccl", [HERE], "nccl", "engine.transfer=nccl"),
    ],
)
def test_which_way_weights_take(asked, places, way, why):
    assert chosen_transfer(asked, places, Path("/dev/shm"), on_gpus=True, colocated=False) == (way, why)


def test_colocated_actors_take_weights_on_the_gpu_where_every_rank_shares_its_own():
    shared = {"on_gpus": True, "colocated": True, "can_share": True}
    assert chosen_transfer("auto", [HERE], Path("/dev/shm"), **shared) == ("ipc", "every rank shares its GPU with one of the actors' workers")
    assert chosen_transfer("auto", [AWAY], Path("/dev/shm"), **shared)[0] == "ipc"
    for other in ({"can_share": False}, {"whole": False}, {"colocated": False}, {"on_gpus": False}):
        assert chosen_transfer("auto", [HERE], Path("/dev/shm"), **shared | other) == ("shared_memory", "all actors see /dev/shm")
    assert chosen_transfer("shared_memory", [HERE], Path("/dev/shm"), **shared)[0] == "shared_memory"
    with pytest.raises(ValueError, match="sends factors as a file, and the actors at 10.0.0.2 do not see .*, or engine.lora=merged"):
        chosen_transfer("auto", [AWAY], Path("/dev/shm"), on_gpus=True, colocated=False, whole=False)


@pytest.mark.parametrize(
    ("asked", "on_gpus", "colocated", "sentence"),
    [
        ("shared_memory", True, False, r"do not see the learner's /dev/shm: use a folder .*engine.exchange=FOLDER\) or engine.transfer=nccl$"),
        ("shared_memory", False, False, r"do not see the learner's /dev/shm: use a folder that all machines share \(engine.exchange=FOLDER\)$"),
        ("auto", False, False, "and here is no GPU for NCCL: use a folder"),
        ("auto", True, True, "colocated actors share the learner's GPU, on which NCCL cannot have two members: use a folder"),
    ],
)
def test_a_way_that_cannot_work_is_refused_with_those_that_can(asked, on_gpus, colocated, sentence):
    with pytest.raises(ValueError, match=sentence):
        chosen_transfer(asked, [HERE, AWAY], Path("/dev/shm"), on_gpus=on_gpus, colocated=colocated)


def test_a_recipe_with_a_transfer_that_its_layout_excludes_is_refused_at_load():
    with pytest.raises(ValueError, match="cannot have two members in one NCCL group.*use engine.transfer=shared_memory.*engine.placement=separate"):
        colocated(**{"engine.transfer": "nccl"})
    with pytest.raises(ValueError, match="factors alone, as a file: use engine.transfer=shared_memory .*engine.lora=merged"):
        recipe(**{"engine.transfer": "nccl", "engine.lora": "adapters", "model.lora": {"rank": 4}})
    with pytest.raises(ValueError, match="engine.transfer=ipc sends whole weights.*use engine.transfer=shared_memory .*engine.lora=merged"):
        colocated(**{"engine.transfer": "ipc", "engine.lora": "adapters", "model.lora": {"rank": 4}})
    with pytest.raises(ValueError, match="of the GPU that learner and actor share: use engine.placement=colocated, or engine.transfer=nccl .or auto"):
        recipe(**{"engine.transfer": "ipc"})
    with pytest.raises(ValueError, match="here are 2 ranks on 1 machines and 1 workers .*make them as many.*use engine.transfer=shared_memory"):
        colocated(**{"engine.transfer": "ipc", "learner.ranks": 2})
    colocated(**{"engine.transfer": "ipc", "learner.ranks": 2, "engine.tensor_parallel": 2})
    with pytest.raises(ValueError, match="engine.transfer=nccl is vLLM's, and engine.kind is torch: use engine=vllm, or leave it out"):
        recipe(**{"engine.transfer": "nccl", "engine.kind": "torch"})


def test_a_plan_counts_a_colocated_actor_while_it_is_awake():
    plans_of = {}
    for share in (0.2, 0.7):
        _, plan = examine(colocated(**{"engine.memory_share": share}), device="h100")
        _, apart = examine(recipe(**{"engine.memory_share": share}), device="h100")
        assert plan.memory["engine"] == {"vLLM": round(share * 80e9)} and "engine" not in apart.memory
        plans_of[share] = plan.bytes
    assert plans_of[0.7] - plans_of[0.2] == round(0.5 * 80e9), "it is awake while the learner's own passes are not"


def test_a_colocated_actor_that_does_not_fit_beside_the_learner():
    gib = 2**30
    check_shared_gpu(0.5, [(40 * gib, 80 * gib), (60 * gib, 80 * gib)])
    with pytest.raises(ValueError, match=r"wants 68.0 GiB, and beside the learner 40.0 of 80.0 GiB are free: use engine.memory_share=0.48 or less"):
        check_shared_gpu(0.85, [(60 * gib, 80 * gib), (40 * gib, 80 * gib)])
    said = r"wants 40.0 GiB, and beside the learner 8.0 of 80.0 GiB are free, 32.0 GiB kept for its moments: use engine.memory_share=0.08 or less"
    with pytest.raises(ValueError, match=said):
        check_shared_gpu(0.5, [(40 * gib, 80 * gib)], 32 * gib)


def test_moments_come_with_the_first_step():
    """8 bytes a parameter that learns: on every rank, or shared out with ZeRO 1 and with masters, or on the host."""
    assert moment_bytes(recipe(), 1000, 2) == 8000
    assert moment_bytes(recipe(**{"learner.zero_stage": 1, "learner.ranks": 2}), 1000, 2) == 4000
    assert moment_bytes(recipe(**{"model.dtype": "bfloat16"}), 1000, 2) == 4000
    assert moment_bytes(recipe(**{"learner.zero_stage": 1, "learner.offload": True, "learner.kind": "deepspeed"}), 1000, 2) == 0


def test_an_address_where_nothing_or_something_else_listens_is_refused_soon():
    with pytest.raises(ValueError, match=r"no Ray cluster answers at ray.address=127.0.0.1:9 \(.*:9: .*refused\); start a cluster"):
        find_cluster("127.0.0.1:9")
    for wrong in ("nonsense", "host:port", "127.0.0.1:99999999"):
        with pytest.raises(ValueError, match="ray.address=" + wrong):
            find_cluster(wrong)
    with socket.create_server(("127.0.0.2", 0)) as silent:
        with pytest.raises(ValueError, match=r"no Ray cluster answers at ray.address=127.0.0.2:\d+ \(.*: no answer within 5 s\)"):
            find_cluster(f"127.0.0.2:{silent.getsockname()[1]}")
    with socket.create_server(("127.0.0.2", 0)) as other:
        thread = threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request"))
        thread.start()
        with pytest.raises(ValueError, match=r"something else than Ray listens there"):
            find_cluster(f"127.0.0.2:{other.getsockname()[1]}")
        thread.join(timeout=10)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a tokenizer of more ids than an actor returns whole rows of."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens([f"<{number}>" for number in range(4100)])
    tokenizer.save_pretrained(folder)
    Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("need", "change", "sentence"),
    [
        ({"entropy": True}, {}, "reads its entropy, which needs all"),
        ({"k": 200}, {}, "hands out 128 log-probs a token at most, not k=200"),
        ({"k": 8}, {"sampling.temperature": 0.7}, "at temperature 1, and sampling.temperature is 0.7"),
    ],
)
def test_what_a_teacher_behind_vllm_cannot_deliver_above_4096_ids(large, need, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_served(recipe(**change), "main", large, SignalNeeds(**need))
    check_served(recipe(**change), "main", BASE, SignalNeeds(**need))
    check_served(recipe(), "main", large, SignalNeeds(k=8))


@pytest.mark.parametrize("need", [{"student_support": True}, {"union": 8}])
def test_a_teacher_that_cannot_score_given_ids_is_refused_before_it_starts(large, need):
    sentence = "on a CPU, which cannot score the student's ids .*teacher_topk.* .as in taid., .*opd, iw_opd.*leave out its engine: vllm"
    with pytest.raises(ValueError, match=sentence):
        check_served(recipe(), "main", large, SignalNeeds(**need), on_gpu=False)
    check_served(recipe(), "main", large, SignalNeeds(**need), on_gpu=True)
    check_served(recipe(), "main", BASE, SignalNeeds(**need), on_gpu=False)  # a small vocabulary comes back whole


@pytest.mark.parametrize(("need", "sentence"), [({"hidden": True}, "no hidden states.*teacher_topk.*opd, iw_opd"), ({"draws": 4}, "cannot draw ids")])
def test_what_no_teacher_behind_vllm_delivers(need, sentence):
    with pytest.raises(ValueError, match=f"signals.main is served by vLLM, .*{sentence}"):
        check_served(recipe(), "main", BASE, SignalNeeds(**need))


@pytest.mark.parametrize("weight", [{"teacher_confidence": {"beta": 1.0}}, {"teacher_entropy_above": {"threshold": 0.5}}, {"batch_confidence": {}}])
def test_a_weight_that_reads_the_teachers_entropy_says_so(weight, large):
    term = {"distill": "reverse_kl", "support": {"teacher_topk": {"k": 8, "tail": "bucket"}}}
    raw = {"data": {"task": "expr"}, "teacher": {"external": {"path": large, "engine": "vllm"}}, "view": "plain", "objective": [term]}
    assert not system.objective_of(parse_recipe(raw)).needs.signals["main"].entropy
    weighted = parse_recipe({**raw, "objective": [{**term, "weight": weight}]})
    assert system.objective_of(weighted).needs.signals["main"].entropy
    with pytest.raises(ValueError, match="reads its entropy"), system.actors_of(weighted):
        pass
    assert not ray.is_initialized()


def test_views_are_cut_to_what_a_teacher_behind_vllm_can_read(large):
    """Its engine holds twice prompt and answer where the model has more; one position is for the token that scoring draws."""
    short = recipe(**{"data.max_prompt_tokens": 40, "sampling.max_tokens": 24})
    config = Qwen3Config(max_position_embeddings=512)
    assert room_for_prompts(short, config, "it", served=False) == 512 - 24
    assert room_for_prompts(short, config, "it", served=True) == 2 * (40 + 24) - 1 - 24
    assert smallest_room(short, 400, {"near": config}, {"main": large}) == 103
    assert smallest_room(short, 100, {"near": config}, {"main": large}) == 100
    with pytest.raises(ValueError, match="leaves no room for a prompt: it has 127 positions"):
        room_for_prompts(recipe(**{"sampling.max_tokens": 200, "engine.positions": 128}), config, "it", served=True)


CLUSTER = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", address="local", _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
RUN = """
import sys, ray
from opd_rollout.vllm_cluster import ActorPlan, connect, start_actors
with start_actors([ActorPlan(role="student", replicas=int(sys.argv[2]))], address=sys.argv[1]) as where:
    for line in sys.stdin:
        print(*((name, ray.get(handle.pid.remote(), timeout=60)) for name, handle in connect(where, "student")), flush=True)
"""


def started(code, *words, auth="token"):
    environment = {**os.environ, **vllm_cluster.QUIET, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": auth}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *words], text=True, env=environment, **pipes)


def asked(process):
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_two_runs_on_one_cluster_have_actors_of_the_same_name_and_do_not_meet():
    """Real Ray, three processes; the actors are ours, empty, without vLLM."""
    with tempfile.TemporaryDirectory(prefix="opd-ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        cluster = started(CLUSTER, scratch)
        address = cluster.stdout.readline().strip()
        first, second = (started(RUN, address, "1") for _ in range(2))
        try:
            ours, theirs = asked(first), asked(second)
            assert ours.startswith("('student-0', ") and theirs.startswith("('student-0', ") and ours != theirs
            third = started(RUN, address, "1")
            _, said = third.communicate(timeout=100)
            assert third.returncode == 1 and f"the Ray cluster at {address} offers 0 free CPUs, and 1 actors need one each" in said
            stranger = started(RUN, address, "1", auth="disabled")
            _, said = stranger.communicate(timeout=100)
            assert stranger.returncode == 1 and "the cluster asks for a token: set RAY_AUTH_MODE=token" in said
            first.stdin.close()
            assert first.wait(timeout=60) == 0
            assert asked(second) == theirs, "one run's end leaves the other's actors alone"
            second.stdin.close()
            assert second.wait(timeout=60) == 0
            assert asked(third := started(RUN, address, "2")).count("student-") == 2, "both are gone: there is room for two"
            third.kill()
            third.communicate()
        finally:
            for process in (first, second):
                process.kill()
                process.wait()
            cluster.stdin.close()  # Ray ends its own with it
            cluster.wait(timeout=60)
