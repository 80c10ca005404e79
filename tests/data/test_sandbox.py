"""Hostile programs: each is closed in, ends in time, and leaves nothing behind. Where isolation fails, nothing runs."""

import subprocess
import time

import pytest

from opd.verify import sandbox
from opd.verify.sandbox import Limits, NoIsolation, run_python, unused_user_id

QUICK = Limits(seconds=1.5, memory_bytes=256 << 20)
THREADS = """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(99,)).start()
    except RuntimeError: pass
"""
DEAF = """
import signal, time
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
time.sleep(1000)
"""
MANY_FILES = """
written = 0
try:
    for number in range(200):
        open(str(number), "wb").write(bytes(1 << 20))
        written += 1
except OSError: pass
print(written)
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)
os.wait()
print("done")
"""
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def running(marker: str) -> bool:
    return marker in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_runs_a_program_under_a_nameless_user_without_environment_or_files():
    found = run_python("import os\nprint(os.getuid() > 100_000, os.listdir('.'), sorted(os.listdir('/dev')), 'PATH' in os.environ, len(os.environ))")
    assert (found.status, found.exit_code) == ("ended", 0), found.stderr
    assert found.stdout == b"True ['program.py'] ['null', 'urandom', 'zero'] True 3\n"  # PATH, HOME, LANG


def test_input_and_output_pass_through():
    assert run_python("import sys\nprint(sys.stdin.read()[::-1], end='')", b"abc" * 100_000).stdout == b"cba" * 100_000


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("while True: pass", "time"),
        ("import time\ntime.sleep(1000)", "time"),
        ("9**9**9", "time"),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "time"),
        (THREADS, "time"),
        (DEAF, "time"),
        ("import os, sys, time\nos.close(1); os.close(2)\ntime.sleep(1000)", "time"),
        ("while True: print('x' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    ],
)
def test_what_never_ends_is_ended(source, status):
    started = time.monotonic()
    found = run_python(f"# never-ending-program\n{source}", limits=QUICK)
    assert found.status == status
    assert time.monotonic() - started < QUICK.seconds + 5.0
    until = time.monotonic() + 10.0  # a program of another process on this machine may be at work for a moment
    while running("/scratch/program.py"):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("open('/proc/self/environ')", "FileNotFoundError"),
        ("open('/usr/new', 'w')", "Read-only file system"),
        ("open('/new', 'w')", "PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)", "Network is unreachable"),
        ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))", "Network is unreachable"),
        ("bytearray(4 << 30)", "MemoryError"),
        ("import os\nos.memfd_create('x')", "Operation not permitted"),
        ("import os\nos.setuid(0)", "Operation not permitted"),
        ("import os\nos.kill(1, 9)", "Operation not permitted"),
        ("import os\nos.chroot('/scratch')", "Operation not permitted"),
        ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", "Error: [Errno"),
        (LIBC + "raise OSError(libc.unshare(0x10000000), ctypes.get_errno())", "OSError: [Errno -1] 1"),
        (LIBC + "raise OSError(libc.mount(b'none', b'/scratch', b'tmpfs', 0, None), ctypes.get_errno())", "OSError: [Errno -1] 1"),
        (LIBC + "raise OSError(libc.shmget(0, 1 << 30, 0o1600), ctypes.get_errno())", "OSError: [Errno -1] 1"),
        (LIBC + "raise OSError(libc.ptrace(0, 0, 0, 0), ctypes.get_errno())", "OSError: [Errno -1] 1"),
    ],
)
def test_what_is_not_allowed_fails_inside(source, error):
    found = run_python(source, limits=Limits(seconds=10.0, memory_bytes=256 << 20))
    assert (found.status, found.exit_code != 0) == ("ended", True)
    assert error in found.stderr.decode()


def test_many_files_cannot_fill_the_memory():
    assert int(run_python(MANY_FILES).stdout) <= Limits().scratch_bytes >> 20


def test_processes_left_behind_end_with_the_program():
    found = run_python(DAEMON)
    assert found.stdout == b"done\n"
    assert not running("/scratch/program.py")


def test_signals_and_exits_are_told_apart():
    assert run_python("raise SystemExit(7)").exit_code == 7
    assert run_python("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)").exit_code == 128 + 11


def test_user_ids_are_unused_and_differ():
    assert len({unused_user_id() for _ in range(20)}) == 20


def test_without_isolation_nothing_runs(monkeypatch, tmp_path):
    marker = tmp_path / "ran"
    child = tmp_path / "child.py"
    source = sandbox._CHILD.read_text()
    assert source.count('call("unshare", kinds)') == 1
    child.write_text(source.replace('call("unshare", kinds)', 'raise OSError(1, "unshare: refused")'))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(NoIsolation, match="unshare: refused"):
        run_python(f"open({str(marker)!r}, 'w')")
    assert not marker.exists()
