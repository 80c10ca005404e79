"""The verifiers under hostile inputs, and on GSM8K: python benchmarks/verifiers.py FOLDER_OF_GSM8K [RESULT.json [PART ...]]

FOLDER holds train.jsonl and test.jsonl (question, answer with ####). Three figures: 1,000 hostile answers and programs, the longest verdict and the
resident memory; verdicts a second on gold answers, as served (plain numbers are compared here) and with every answer sent to math-verify's process;
agreement on gold answers and on wrong ones made from them.
"""

import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from opd.types import Prompt
from opd.verify import judge, make_verifier
from opd.verify.answers import read_number
from opd.verify.math import MathVerifier

DEADLINE = 0.25
PROGRAM_SECONDS = 0.5
GOLDS = ("42", "\\frac{1}{2}", "\\sqrt{8}", "x^2+1", "(1,2)", "\\{1,2,3\\}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "[0,1)")


def hostile_answer(dice: random.Random) -> str:
    """One text that tries to take long, to crash a parser, or to run something."""
    n, deep = dice.randint(2, 9), dice.randint(50, 900)
    bodies = [
        "^".join(["9"] * 3) + f"^{{9^{{9^{{{n}}}}}}}",
        f"(x+y+z)^{{{dice.randint(50, 5000)}}}",
        "(" * deep + "x" + ")" * deep,
        "\\frac{1}{" * (deep // 9) + "2" + "}" * (deep // 9),
        f"\\sum_{{n=1}}^{{10^{n}}} n!",
        f"{dice.randint(10**4, 10**6)}!",
        "\\int_0^{\\infty} e^{-x^{" + str(n) + "}} \\sin(x^x) dx",
        f"\\sqrt[{n * 10**6}]{{2}}",
        "+".join(f"x_{{{i}}}^{{{i}}}" for i in range(deep // 4)),
        "\\{" + ",".join(str(dice.random()) for _ in range(deep // 8)) + "\\}",
        "\\begin{pmatrix}" + "&".join(["1"] * (deep // 3)) + "\\end{pmatrix}",
        f"__import__('os').system('sleep {n}')",
        f"10^{{10^{{{n + 1}}}}} \\bmod 7",
        "\\binom{10^9}{5\\cdot10^8}",
        "\\lim_{x\\to0}" * n + "\\frac{\\sin x}{x}",
        "\\tan" * (deep // 5) + "x",
        "1" * 990,
        "0." + "3" * 900,
        f"\\prod_{{k=1}}^{{{10**n}}}(1+\\frac1k)",
        "\\left(" * (deep // 7),
        "\x00\ud7ff\U0010ffff" * n,
        f"\\log_{{{n}}}(\\log(\\log(\\log(10^{{10^{{10}}}}))))",
        "x^{" * (deep // 9) + "x" + "}" * (deep // 9),
        "\\text{" + "a" * 900 + "}",
    ]
    body = dice.choice(bodies)
    return dice.choice(
        (f"\\boxed{{{body}}}", f"#### {body}", f"\\boxed{{{body}", "\\boxed{" * deep + body, body, f"{body}\n" * 50 + f"\\boxed{{{body}}}")
    )


PROGRAMS = (
    "while True: pass",
    "import os\nwhile True: os.fork()",
    "x = 10 ** 10 ** 10",
    "print('y' * 10**9)",
    "while True: print('y' * 1000)",
    "x = bytearray(10**10)",
    "import socket\nsocket.create_connection(('127.0.0.1', 22))",
    "print(open('/etc/passwd').read())",
    "import time\ntime.sleep(100)",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "open('f', 'wb').write(bytes(10**9))",
    "def f(): f()\nf()",
    "import ctypes\nctypes.string_at(0)",
    "import sys\nsys.setrecursionlimit(10**8)\ndef f(): f()\nf()",
    "import os\nos._exit(0)",
)


def resident_mib() -> float:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def under_attack(number: int, programs: int) -> dict[str, object]:
    """The longest verdicts and the memory over so many hostile answers and programs."""
    dice, maths = random.Random(0), MathVerifier(deadline_seconds=DEADLINE)
    code = make_verifier({"code": {"seconds": PROGRAM_SECONDS, "memory_mib": 256}})
    judge(maths, Prompt(id="p", messages=(), answer="\\sqrt{2}"), "\\boxed{\\sqrt2}")
    seconds: dict[str, list[float]] = {"math": [], "code": []}
    statuses, memory, right = Counter(), [], 0
    kinds = ["code"] * programs + ["math"] * (number - programs)
    dice.shuffle(kinds)
    for done, kind in enumerate(kinds):
        if done % 100 == 0:
            memory.append(round(resident_mib(), 1))
        started = time.perf_counter()
        if kind == "math":
            verdict = judge(maths, Prompt(id="p", messages=(), answer=dice.choice(GOLDS)), hostile_answer(dice))
        else:
            tests = json.dumps({"inputs": ["3\n"], "outputs": ["9\n"]})
            verdict = judge(code, Prompt(id="p", messages=(), answer=tests), f"```python\n{dice.choice(PROGRAMS)}\n```")
        seconds[kind].append(time.perf_counter() - started)
        statuses[f"{kind} {verdict.status}"] += 1
        right += verdict.correct
    memory.append(round(resident_mib(), 1))
    maths.close()
    return {
        "inputs": number,
        "judged right": right,
        "statuses": dict(sorted(statuses.items())),
        "resident MiB every 100": memory,
        "children's largest MiB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
        **{
            f"{kind}: deadline, longest, 99th, median seconds": [
                DEADLINE if kind == "math" else PROGRAM_SECONDS,
                *(round(v, 3) for v in (max(s), statistics.quantiles(s, n=100)[98], statistics.median(s))),
            ]
            for kind, s in seconds.items()
        },
    }


def read(folder: Path) -> list[tuple[str, str]]:
    """(worked answer, gold) of both splits."""
    lines = [json.loads(line) for name in ("train", "test") for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["answer"], line["answer"].rpartition("####")[2].strip()) for line in lines]


def wrong_answers(gold: str, dice: random.Random) -> list[str]:
    """Numbers near the gold one that differ from it."""
    value = read_number(gold)
    assert value is not None and value.denominator == 1, gold
    n = int(value)
    near = {n + 1, n - 1, n * 10, -n, n + 100, n * 2, int(str(abs(n))[::-1]), n // 2, n + dice.randint(2, 9)} - {n}
    return [str(each) for each in sorted(near)] + [f"{n}.5", f"{n}/7" if n else "1/7", f"{n:,}1", f"{n}\\frac{{1}}{{3}}"]


def agreement(golds: list[tuple[str, str]]) -> dict[str, object]:
    """Gold answers judged right and changed ones judged wrong, in the forms that models write."""
    dice, maths = random.Random(1), MathVerifier()
    forms = ("#### {}", "\\boxed{{{}}}", "The answer is {}.", "\\boxed{{\\${}}}", "so \\boxed{{{}\\text{{ dollars}}}}")
    right, wrong, statuses, slips = 0, 0, Counter(), []
    for worked, gold in golds:
        prompt = Prompt(id="p", messages=(), answer=gold)
        right += judge(maths, prompt, worked).correct and all(judge(maths, prompt, form.format(gold)).correct for form in forms[:4])
        answer = dice.choice(wrong_answers(gold, dice))
        text = dice.choice(forms).format(answer)
        verdict = judge(maths, prompt, text)
        statuses[verdict.status] += 1
        wrong += verdict.status == "score" and not verdict.correct
        if verdict.status != "score" or verdict.correct:
            slips.append([gold, text, verdict.status])
    maths.close()
    return {"gold answers": len(golds), "judged right, in five forms": right, "changed answers": len(golds), "judged wrong": wrong,
            "statuses": dict(statuses), "slips": slips[:20]}  # fmt: skip


def throughput(golds: list[tuple[str, str]]) -> dict[str, float]:
    """Verdicts a second: as served, and with every answer through math-verify's process."""
    maths = MathVerifier()
    prompts = [(Prompt(id="p", messages=(), answer=gold), worked, gold) for worked, gold in golds]
    maths._ask("\\sqrt{2}", "\\sqrt2")  # starts the process
    started = time.perf_counter()
    for prompt, worked, _ in prompts:
        maths(prompt, worked)
    served = len(prompts) / (time.perf_counter() - started)
    some, started = prompts[:1500], time.perf_counter()
    for _, _, gold in some:
        assert maths._ask(gold, gold)["correct"]
    asked = len(some) / (time.perf_counter() - started)
    maths.close()
    return {"verdicts a second, as served": round(served), "verdicts a second, all through math-verify (one process)": round(asked)}


def main(folder: str, result: str = "", *parts: str) -> None:
    golds = read(Path(folder))
    found = json.loads(Path(result).read_text(encoding="utf-8")) if parts and Path(result).is_file() else {}
    found |= {"machine": f"{os.cpu_count()} cores, no GPU, Python {platform.python_version()}", "date": time.strftime("%Y-%m-%d")}
    measures = {"throughput": lambda: throughput(golds), "agreement": lambda: agreement(golds), "hostile": lambda: under_attack(1000, 100)}
    found |= {part: measures[part]() for part in parts or measures}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    print(text)
    if result:
        Path(result).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
