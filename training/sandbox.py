"""Runs a Python program that nobody has read, in a confined process of its own, and says whether it came to its end.

Run as a script, with ``python -I``, this file is that process. Before the program it takes from itself, where the system offers the means,

- Linux on x86-64 and aarch64: new processes and threads, signals, sockets, changes of mode and owner (seccomp filter);
- Linux 5.13 or newer with Landlock: writing anywhere but to files of the temporary folder;
- everywhere: more processor time, memory, open files and bytes a file than :class:`Limits` (setrlimit).

What the system does not offer is reported by :func:`missing_protections`. The program can read what its user can read, but has no network
to send it to and no output that is kept. It shares its process with its tests: one that looks for the secret of :func:`run_program` in the
interpreter's own frames, or changes what its tests call, passes. Only reading the program helps against that.
"""

import ctypes
import json
import os
import platform
import resource
import secrets
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import types
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of time and of processor time.
        memory_bytes: address space. file_bytes: size of a file it writes.
    """

    seconds: int = 10
    memory_bytes: int = 2**30
    file_bytes: int = 2**20


LIMITS = Limits()


def run_program(source: str, limits: Limits = LIMITS) -> bool:
    """Runs a program and says whether its last line was reached without an exception.

    The process has an empty environment, an empty temporary folder that is deleted afterwards, no input, and output that nobody reads. It
    says that the program ended by a secret that is not in the program's text, so that neither an exit status nor a printed line counts.
    """
    secret = secrets.token_bytes(16)
    with tempfile.TemporaryDirectory(prefix="credence-program-", ignore_cleanup_errors=True) as folder:
        reading, writing = os.pipe()
        try:
            arguments = json.dumps({"source": source, "secret": secret.hex(), "channel": writing, **asdict(limits)})
            process = subprocess.Popen(
                [sys.executable, "-I", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd=folder,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(arguments.encode())
            # The channel ends with the process, so nothing is left to wait for after its end.
            with selectors.DefaultSelector() as selector:
                selector.register(reading, selectors.EVENT_READ)
                said = os.read(reading, len(secret) + 1) if selector.select(limits.seconds + 1) else b""
        except BrokenPipeError:
            said = b""
        finally:
            os.close(reading)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return secrets.compare_digest(said, secret)


@cache
def missing_protections() -> tuple[str, ...]:
    """What this system does not take from a program, as clauses of a sentence; empty where it is confined altogether."""
    found = []
    if _system_calls() is None or not run_program(_EXPECT.format(call="os.fork()", error="PermissionError")):
        found.append("start processes and use the network")
    outside = Path(tempfile.gettempdir()) / f"credence-outside-{secrets.token_hex(8)}"
    if not run_program(_EXPECT.format(call=f"open({str(outside)!r}, 'w')", error="PermissionError")):
        found.append("change the files that this user can change")
    outside.unlink(missing_ok=True)
    return tuple(found)


_EXPECT = """import os
try:
    {call}
except {error}:
    pass
else:
    os._exit(1)
"""

# The numbers of the system calls that are refused, on x86-64 and aarch64 (None: it has no such call).
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table above and the kernel's name of the architecture (AUDIT_ARCH_*)."""
_X32 = 0x40000000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF instructions on 32-bit words
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001  # the last with errno EPERM
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_WRITE = 0b1_1111_1111_0010  # WRITE_FILE, REMOVE_DIR, REMOVE_FILE and the seven MAKE_*; 1 << 13 and up: by the kernel's version
_LANDLOCK_REFER, _LANDLOCK_TRUNCATE = 1 << 13, 1 << 14
_LANDLOCK_IN_FOLDER = (
    1 << 1 | 1 << 5 | 1 << 8
)  # WRITE_FILE, REMOVE_FILE, MAKE_REG: no folders, which could be nested without end


def _system_calls() -> tuple[int, list[int]] | None:
    """The architecture's name for the kernel and the calls to refuse; None where they are not known."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return None
    column, architecture = _ARCHITECTURES[platform.machine()]
    return architecture, [number for numbers in _REFUSED.values() if (number := numbers[column]) is not None]


def _refuse_system_calls(libc: ctypes.CDLL) -> None:
    known = _system_calls()
    if known is None:
        return
    architecture, refused = known
    n = len(refused)
    program = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_AT_LEAST, n, 0, _X32),
        *((_EQUAL, n - index, 0, number) for index, number in enumerate(refused)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    filter_program = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_program, 0, 0)


def _restrict_writing(libc: ctypes.CDLL, folder: str) -> None:
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    handled = _LANDLOCK_WRITE | (_LANDLOCK_REFER if version >= 2 else 0) | (_LANDLOCK_TRUNCATE if version >= 3 else 0)
    rules = ctypes.create_string_buffer(struct.pack("=Q", handled), 8)
    ruleset = libc.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(8), 0)
    below = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    allowed = (_LANDLOCK_IN_FOLDER | _LANDLOCK_TRUNCATE) & handled
    rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, below), 12)
    libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
    libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(below)
    os.close(ruleset)


def _confine(limits: Limits) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, limits.seconds),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _restrict_writing(libc, os.getcwd())
        _refuse_system_calls(libc)


def _main() -> None:
    given = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limits = Limits(**{name: given[name] for name in ("seconds", "memory_bytes", "file_bytes")})
    module = types.ModuleType("__main__")
    code = compile(given["source"], "program.py", "exec")
    sys.modules["__main__"] = module
    _confine(limits)
    exec(code, module.__dict__)
    os.write(given["channel"], bytes.fromhex(given["secret"]))
    os._exit(0)  # threads and exit handlers of the program have no say any more


if __name__ == "__main__":
    _main()
