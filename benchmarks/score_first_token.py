"""Does a stream in mode `score` wait for its samples? Time to first token, and to the end, against the same stream without uncertainty.

    python benchmarks/score_first_token.py [--pairs 30] [--dtype bfloat16] [--write]

Pairs of streamed requests to one server, the mean's text plain and with mode `score` at K = 8, in alternating order; the median of the
pairs' ratios with a 95 % bootstrap interval.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from credence.benchmarks.measure import bootstrap_interval, machine, wait_idle
from credence.benchmarks.servers import EngineSettings, credence_server, request_body
from credence.benchmarks.workload import ModelShape, random_workload

K, TOKENS = 8, 32
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/score_first_token.md")
    arguments = parser.parse_args()
    plain = request_body(new_tokens=TOKENS)
    score = request_body(new_tokens=TOKENS, num_samples=K)
    score["uncertainty"]["mode"] = "score"
    settings = EngineSettings(dtype=arguments.dtype, max_length=2 * TOKENS, max_samples=K, threads=1)
    ratios: dict[str, list[float]] = {"first token": [], "whole answer": [], "CPU": []}
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch:
        workload = random_workload(Path(scratch), ModelShape(), max_length=2 * TOKENS)
        with credence_server(workload, settings, Path(scratch) / "log", print) as server:
            for number in range(arguments.pairs + 2):
                pair = {}
                for name in ("plain", "score") if number % 2 else ("score", "plain"):
                    wait_idle(server.pids)
                    prompt = workload.prompt(TOKENS, 2 * number + (name == "plain"))
                    pair[name] = server.measure_stream(prompt, plain if name == "plain" else score)
                if number < 2:  # warm-up
                    continue
                (first_plain, plain_whole), (first_score, score_whole) = pair["plain"], pair["score"]
                for what, (a, b) in {
                    "first token": (first_score, first_plain),
                    "whole answer": (score_whole.wall_ms, plain_whole.wall_ms),
                    "CPU": (score_whole.cpu_ms, plain_whole.cpu_ms),
                }.items():
                    ratios[what].append(a / b)
                    values.setdefault(f"{what} score", []).append(a)
                    values.setdefault(f"{what} plain", []).append(b)
    lines = [
        f"# Mode `score`, K = {K}, in a stream, against the same stream without uncertainty",
        "",
        f"`python benchmarks/score_first_token.py --dtype {arguments.dtype} --pairs {arguments.pairs} --write`",
        "",
        f"{workload.name}, {workload.num_parameters / 1e6:.0f} M parameters, {arguments.dtype}, {TOKENS} + {TOKENS} tokens, {machine()}, "
        f"{settings.threads} thread. {arguments.pairs} pairs in alternating order, medians.",
        "",
        "| | score ms | plain ms | ratio | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for what, pairs in ratios.items():
        low, high = bootstrap_interval(pairs)
        ours, theirs = (statistics.median(values[f"{what} {name}"]) for name in ("score", "plain"))
        lines.append(
            f"| {what} | {ours:.1f} | {theirs:.1f} | {statistics.median(pairs):.3f} | {low:.3f} - {high:.3f} |"
        )
    print("\n".join(lines))
    if arguments.write:
        (RESULTS / "score_first_token.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
