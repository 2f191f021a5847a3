"""How many samples does `n_samples: "auto"` save, and does it decide as all samples do?

    python benchmarks/adaptive_k.py --adapter DIR [--base DIR] [--questions 205] [--write]

Asks a server the demo world's questions of all three kinds, with the relation's 16 possible answers as choices: once with the most
samples, then adaptively at several values of `stop_confidence`, with and without a threshold; and scores the mean's answers (mode score,
flag at a threshold). A decision is the top answer, and the flag where there is a threshold. DIR is an adapter of the demo
(`python -m credence.demo.run --output OUT` leaves it in OUT/adapter).
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from credence.clients import Client
from credence.clients.requests import Mode
from credence.demo.base_model import MODEL_DIR
from credence.demo.server import Server, credence_command, free_port
from credence.demo.world import Fact, World

MAXIMUM, THRESHOLD = 32, 0.5
CONFIDENCES = (0.8, 0.95, 0.99)
RESULTS = Path(__file__).parent / "results"


def ask(client: Client, fact: Fact, mode: Mode, n_samples: Any, threshold: float | None, confidence: float) -> Any:
    """One question; its uncertainty and its decision."""
    prompt, options = fact.prompt, dict[str, Any]()
    if mode == "choices":
        prompt = f"{fact.prompt} {fact.relation.leads[0]}"
        options = {"choices": [f" {answer}" for answer in fact.relation.answers]}
    if n_samples == "auto":
        options["stop_confidence"] = confidence
    answer = client.complete(
        prompt,
        model="demo",
        uncertainty=True,
        mode=mode,
        n_samples=n_samples,
        threshold=threshold,
        max_tokens=4,
        temperature=0.0,
        **options,
    )
    assert answer.uncertainty is not None
    scores = answer.uncertainty
    tried = scores.auto.stages if scores.auto is not None else [scores.n_effective]
    computed = sum(tried) if mode == "score" else tried[-1]
    return scores.n_effective, computed, (answer.text, scores.flag)


def compare(client: Client, facts: Sequence[Fact], mode: Mode, threshold: float | None) -> list[dict[str, Any]]:
    """Rows of the table: one for each stop_confidence."""

    def all_of(n_samples: Any, confidence: float) -> list[Any]:
        question: Callable[[Fact], Any] = lambda fact: ask(client, fact, mode, n_samples, threshold, confidence)  # noqa: E731
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(question, facts))

    full = all_of(MAXIMUM, 0.95)
    rows = []
    for confidence in CONFIDENCES:
        auto = all_of("auto", confidence)
        used = [answer[0] for answer in auto]
        rows.append(
            {
                "mode": mode,
                "threshold": threshold,
                "stop_confidence": confidence,
                "mean_samples": mean(used),
                "computed_samples": mean(answer[1] for answer in auto),
                "stages": {str(k): used.count(k) for k in sorted(set(used))},
                "different_decisions": sum(a[2] != b[2] for a, b in zip(auto, full, strict=True)),
                "questions": len(facts),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=MODEL_DIR)
    parser.add_argument("--questions", type=int, default=205, help="of each kind (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/adaptive_k.{json,md}")
    arguments = parser.parse_args()
    world = World(0)
    facts = [fact for kind in ("known", "noisy", "unknown") for fact in world.questions(kind, arguments.questions)]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        credence_command(),
        "serve",
        str(arguments.base),
        "--adapter",
        f"demo={arguments.adapter}",
        "--port",
        str(port),
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-samples", str(MAXIMUM)]
    command += ["--block-size", "32"]
    with tempfile.TemporaryDirectory() as scratch:
        server_log = Path(scratch) / "log"
        with Server(command, url=url, log=server_log) as server, Client(url, timeout_s=600) as client:
            server.wait_ready(client, timeout_s=600, waiting=lambda: None)
            rows = compare(client, facts, "choices", None)
            rows += compare(client, facts, "choices", THRESHOLD)
            rows += compare(client, facts, "score", THRESHOLD)
    print(json.dumps(rows))
    if arguments.write:
        write(rows)


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Writes both result files."""
    (RESULTS / "adaptive_k.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    lines = [
        f"# Adaptive K on the demo's questions (largest K = {MAXIMUM})",
        "",
        f"`python benchmarks/adaptive_k.py --adapter ADAPTER --questions {rows[0]['questions'] // 3} --write`; ADAPTER from",
        "`python -m credence.demo.run`. Questions of all three kinds in equal numbers; `mean samples` counts what the answer used, a",
        "decision is the top answer and, with a threshold, the flag.",
        "",
        "Mode `score` reads the text again in every stage, so it computes more samples than it uses, but skips stages that cannot",
        "settle; `choices` reads nothing twice.",
        "",
        "| mode | threshold | stop_confidence | mean samples | computed | answers by number of samples | decisions unlike all samples' |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = ", ".join(f"{k}: {count}" for k, count in row["stages"].items())
        lines.append(
            f"| {row['mode']} | {row['threshold'] or '-'} | {row['stop_confidence']} | {row['mean_samples']:.1f} "
            f"| {row['computed_samples']:.1f} | {counts} "
            f"| {row['different_decisions']} of {row['questions']} ({row['different_decisions'] / row['questions']:.1%}) |"
        )
    (RESULTS / "adaptive_k.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
