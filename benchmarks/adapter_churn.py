"""Does a server that loads and unloads adapters all day keep anything? Slots, memory and descriptors over many cycles.

    python benchmarks/adapter_churn.py [--cycles 1000] [--control] [--write]

A cycle loads an artifact of a new digest under one name, asks it with and without uncertainty, and takes it away. Every second cycle also
replaces it by another before. The first cycles warm up and are not counted; after the last the server must be where it was. With --control
a cycle only asks, as often as the loads and their canaries do, an adapter that stays: what grows then has nothing to do with loading.
"""

import argparse
import json
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from credence.adapters import Artifact, load_artifact, write_artifact
from credence.benchmarks.measure import BenchError, machine, resident_mib
from credence.benchmarks.servers import EngineSettings, Target, credence_server, request_body
from credence.benchmarks.workload import ModelShape, Workload, random_workload

K, TOKENS, NAME = 4, 4, "churn"
WARM_UP = 50
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Residue:
    """What the server holds when nothing is asked of it.

    Attributes:
        slots: sample slots by state.
        memory_mib: resident memory of each process, MiB.
        descriptors: open files and sockets of each process.
        artifacts: copies in the private store.
        series: lines of /metrics.
    """

    slots: dict[str, int]
    memory_mib: tuple[float, ...]
    descriptors: tuple[int, ...]
    artifacts: int
    series: int


def residue(server: Target, scratch: Path) -> Residue:
    """Looks at the server when nothing drains any more."""
    while any(state["state"] == "draining" for state in _get(server, "/admin/v1/adapters").json()["data"]):
        time.sleep(0.05)
    lines = _get(server, "/metrics").text.splitlines()
    prefix = 'credence_sample_slots{state="'
    slots = {
        line.removeprefix(prefix).partition('"')[0]: int(float(line.rpartition(" ")[2]))
        for line in lines
        if line.startswith(prefix)
    }
    return Residue(
        slots=slots,
        memory_mib=tuple(resident_mib(pid) for pid in server.pids),
        descriptors=tuple(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in server.pids),
        artifacts=len(list(scratch.glob("credence-serve-*/artifacts/*"))),
        series=sum(not line.startswith("#") for line in lines),
    )


def cycle(server: Target, artifact: Artifact, folder: Path, number: int, prompt: Sequence[int]) -> None:
    """One cycle; raises BenchError when an answer is not as it should be."""
    for turn in range(1 + number % 2):
        digest = _version(artifact, folder, f"{number}.{turn}")
        body = {"name": NAME, "path": str(folder), "replace": turn > 0}
        loaded = _checked(server.http.post("/admin/v1/adapters", json=body)).json()
        if loaded["digest"] != digest:
            raise BenchError(f"cycle {number} loaded {loaded['digest']}, the folder holds {digest}")
        for num_samples in (0, K):
            answer = server.complete([prompt], request_body(new_tokens=TOKENS, num_samples=num_samples, model=NAME))[0]
            if num_samples and answer["choices"][0]["uncertainty"]["adapter"]["digest"] != digest:
                raise BenchError(f"cycle {number} was answered by another artifact than {digest}")
    _checked(server.http.delete(f"/admin/v1/adapters/{NAME}"))


def asks(server: Target, number: int, prompt: Sequence[int]) -> None:
    """A cycle of the control: as many requests, no load."""
    for num_samples in (0, K, K, K) * (1 + number % 2):
        server.complete([prompt], request_body(new_tokens=TOKENS, num_samples=num_samples))


def main() -> None:
    """Runs the cycles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--control", action="store_true", help="only ask, load nothing")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/adapter_churn.md")
    arguments = parser.parse_args()
    shape = ModelShape(hidden_size=128, intermediate_size=256, num_layers=2, vocab_size=512)
    settings = EngineSettings(dtype="float32", max_length=64, max_samples=K, threads=1, kv_cache_gib=1)
    with tempfile.TemporaryDirectory(prefix="credence-bench-") as name:
        scratch = Path(name)
        workload = random_workload(scratch, shape, max_length=64)
        artifact, folder, key = load_artifact(workload.adapter), scratch / "roots" / NAME, scratch / "key"
        folder.parent.mkdir()
        key.write_text(secrets.token_urlsafe())
        key.chmod(0o600)
        flags = ["--adapter-root", str(folder.parent), "--admin-key-file", str(key)]
        environment = {"TMPDIR": str(scratch)}
        with credence_server(workload, settings, scratch / "log", print, flags, environment) as server:
            server.http.auth = lambda request: _authorised(request, key.read_text())
            loads = None if arguments.control else (artifact, folder)
            seen = _run(server, loads, workload, arguments.cycles, scratch)
    lines = _report(seen, arguments.cycles, workload, control=arguments.control)
    print("\n".join(lines))
    if arguments.write:
        name = "adapter_churn_control.md" if arguments.control else "adapter_churn.md"
        (RESULTS / name).write_text("\n".join(lines) + "\n")


def _run(
    server: Target, loads: tuple[Artifact, Path] | None, workload: Workload, cycles: int, scratch: Path
) -> dict[int, Residue]:
    """Looks at the server before the first counted cycle and after every tenth part of them."""
    seen = {}
    for number in range(-WARM_UP, cycles):
        if number >= 0 and number % max(cycles // 10, 1) == 0:
            seen[number] = residue(server, scratch)
            print(json.dumps({"cycle": number, "memory_mib": [round(value) for value in seen[number].memory_mib]}))
        prompt = workload.prompt(8, number % 7)
        if loads is None:
            asks(server, number, prompt)
        else:
            cycle(server, *loads, number, prompt)
    seen[cycles] = residue(server, scratch)
    return seen


def _report(seen: dict[int, Residue], cycles: int, workload: Workload, *, control: bool) -> list[str]:
    what = (
        "The control: as many requests as with loads, to an adapter that stays."
        if control
        else f"A new digest each time, every second cycle two; K = {K} and the mean are asked in each."
    )
    lines = [
        f"# {cycles} cycles of {'requests without loading' if control else 'loading and taking away an adapter'}",
        "",
        f"`python benchmarks/adapter_churn.py --cycles {cycles}{' --control' * control} --write`",
        "",
        f"{workload.name}, {machine()}, 1 thread. {what} "
        f"After {WARM_UP} cycles of warm-up; memory and descriptors of the server's processes (API, engine, ...).",
        "",
        "| after cycles | slots leased / resident / free | memory, MiB | descriptors | stored artifacts | metric lines |",
        "|---|---|---|---|---|---|",
    ]
    for number, state in seen.items():
        slots = " / ".join(str(state.slots[name]) for name in ("leased", "resident", "free"))
        memory = " + ".join(f"{value:.1f}" for value in state.memory_mib)
        descriptors = " + ".join(map(str, state.descriptors))
        lines.append(f"| {number} | {slots} | {memory} | {descriptors} | {state.artifacts} | {state.series} |")
    return lines


def _version(artifact: Artifact, folder: Path, number: str) -> str:
    """Writes the artifact under a digest of its own."""
    return write_artifact(
        folder,
        adapter_config=artifact.adapter_config,
        mean=artifact.mean,
        posteriors=artifact.posteriors,
        config=artifact.config,
        metrics={"version": number},
        replace=True,
    )


def _authorised(request: httpx2.Request, key: str) -> httpx2.Request:
    """Sends the administrator's key where it is taken; users' routes of this server are open."""
    if request.url.path.startswith("/admin/"):
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _get(server: Target, path: str) -> httpx2.Response:
    return _checked(server.http.get(path))


def _checked(response: httpx2.Response) -> httpx2.Response:
    if response.status_code >= httpx2.codes.BAD_REQUEST:
        raise BenchError(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
    return response


if __name__ == "__main__":
    main()
