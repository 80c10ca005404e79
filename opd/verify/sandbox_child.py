"""Run as a script: closes itself in, then becomes the untrusted program. Standard library only, so that nothing of the project is needed inside.

argv: a JSON object with the keys of opd.verify.sandbox.Limits, `uid` (an unused user id, for a caller who is root), `readable` (folders to
show read-only), `command` and `script` (the program, written into the scratch). Exit status SETUP_FAILED and a line on stderr: not isolated.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

SETUP_FAILED = 97
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
NOBODY = 65534
KEPT = {8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}  # statvfs flags -> mount flags (noexec, noatime, nodiratime, relatime)
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

# Calls that would reach memory outside the limits or open further parts of the kernel; the program gets "not permitted".
# unshare, setns, mount, umount2, pivot_root, the new mount calls, memfd_create, memfd_secret, shmget, msgget, ptrace, bpf, perf_event_open,
# userfaultfd, keyctl, add_key, request_key, the three of io_uring, process_vm_readv and _writev
DENIED = {
    "x86_64": (
        [272, 308, 165, 166, 155, 428, 429, 430, 431, 432, 442, 319, 447, 29, 68, 101, 321, 298, 323, 250, 248, 249, 425, 426, 427, 310, 311],
        {"audit": 0xC000003E, "clone": 56, "clone3": 435},
    ),
    "aarch64": (
        [97, 268, 40, 39, 41, 428, 429, 430, 431, 432, 442, 279, 447, 194, 186, 117, 280, 241, 282, 219, 217, 218, 425, 426, 427, 270, 271],
        {"audit": 0xC00000B7, "clone": 220, "clone3": 435},
    ),
}
NAMESPACES = NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | 0x02000000  # the last: control groups

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source, target, kind, flags, options=""):
    call("mount", source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), options.encode())


def unshare(job):
    kinds = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    if os.geteuid() == 0:
        call("unshare", kinds)
        return
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", kinds | NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    job["uid"] = None  # the only id of the namespace has no rights once it runs a program


def close_in(job):
    """A new root: a small tmpfs with the readable folders bound read-only, a few devices, and a writable scratch."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    root = "/tmp"  # any folder serves: the mount is seen in this namespace alone
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={job['scratch_bytes']},mode=755")
    for folder in job["readable"]:
        source = os.path.realpath(folder)
        os.makedirs(root + folder, exist_ok=True)
        mount(source, root + folder, "", MS_BIND)
        mount("none", root + folder, "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept_flags(source))
    os.makedirs(root + "/dev")
    for device in ("null", "zero", "urandom"):
        with open(f"{root}/dev/{device}", "w"):
            pass
        mount(f"/dev/{device}", f"{root}/dev/{device}", "", MS_BIND)
    os.makedirs(root + "/scratch", mode=0o777)
    os.chmod(root + "/scratch", 0o777)
    with open(root + "/scratch/program.py", "w") as file:
        file.write(job["script"])
    os.chmod(root + "/scratch/program.py", 0o644)
    os.makedirs(root + "/old")
    if libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], root.encode(), f"{root}/old".encode()) != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")
    call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    os.chdir("/scratch")


def kept_flags(path):
    """Flags of the mount underneath, which an unprivileged remount must not drop."""
    flags = os.statvfs(path).f_flag
    return sum(mount_flag for stat_flag, mount_flag in KEPT.items() if flags & stat_flag)


def limit(job):
    pairs = [
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_FSIZE, job["scratch_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ]
    for kind, value in pairs:
        resource.setrlimit(kind, (value, value))


def become(job):
    """Gives every right away, then runs the program in this process."""
    limit(job)
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.closerange(3, 4096)
    filter_calls()
    os.execve(job["command"][0], job["command"], {"PATH": "/usr/bin:/bin", "HOME": "/scratch", "LANG": "C.UTF-8"})


def filter_calls():
    """A seccomp filter (classic BPF): DENIED calls and clones into new namespaces fail, clone3 is unknown (libraries fall back to clone)."""
    numbers, known = DENIED[os.uname().machine]
    load, jump_equal, jump_above, jump_set, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, not_permitted, unknown = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    program = [
        (load, 0, 0, 4), (jump_equal, 1, 0, known["audit"]), (answer, 0, 0, kill),
        (load, 0, 0, 0), (jump_above, 0, 1, 0x40000000), (answer, 0, 0, not_permitted),
        (jump_equal, 0, 1, known["clone3"]), (answer, 0, 0, unknown),
        *(row for number in numbers for row in ((jump_equal, 0, 1, number), (answer, 0, 0, not_permitted))),
        (jump_equal, 0, 3, known["clone"]), (load, 0, 0, 16), (jump_set, 0, 1, NAMESPACES), (answer, 0, 0, not_permitted),
        (answer, 0, 0, allow),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    call("prctl", PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0)


def first_process(job):
    """Process 1 of the namespaces: closes in, starts the program, ends with it; the kernel then ends all that the program left."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    close_in(job)
    call("sethostname", b"sandbox", ctypes.c_size_t(7))
    program = os.fork()
    if program == 0:
        become(job)
    return ended(program)


def ended(child):
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def read_exactly(count):
    parts = b""
    while len(parts) < count:
        piece = os.read(0, count - len(parts))
        if not piece:
            raise OSError(0, "the job broke off")
        parts += piece
    return parts


def guarded(function, *arguments):
    """The function's result; a failure ends this process, since going on would run the program in the open."""
    try:
        return function(*arguments)
    except BaseException as error:
        print(f"sandbox: {error}", file=sys.stderr, flush=True)
        os._exit(SETUP_FAILED)


def main():
    job = json.loads(read_exactly(int.from_bytes(read_exactly(8), "big")))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    unshare(job)
    child = os.fork()
    os._exit(guarded(first_process, job) if child == 0 else ended(child))


guarded(main)
