"""What do M members trained side by side cost, against one training?

    python benchmarks/ensemble_training.py --models DIR --data DIR [--members 5] [--steps 40] [--rounds 4]

stories260K on 500 rows of clinc_domains, batch 16 per member, MAP members. Rounds alternate between one training and one ensemble;
the ratio is the median of the rounds' ratios of training seconds (without loading). Prints one JSON line.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from credence.benchmarks.measure import interleave, machine
from credence.training.config import load_config
from credence.training.loop import train

ROWS = 500


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder holding stories260K/")
    parser.add_argument("--data", type=Path, required=True, help="folder holding clinc_domains/")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    common = [
        f"train.max_steps={options.steps}",
        "train.batch_size=16",
        "train.learning_rate=0.01",
        "train.save_steps=0",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "train.jsonl"
        rows = (options.data / "clinc_domains" / "train.jsonl").read_text().splitlines()[:ROWS]
        data.write_text("\n".join(rows) + "\n")

        def seconds(method: str, *settings: str) -> float:
            with tempfile.TemporaryDirectory(dir=scratch) as output:
                config = load_config(None, [*common, *settings])
                return train(options.models / "stories260K", data, None, method, Path(output) / "out", config).seconds

        found = interleave(
            {
                "one": lambda: seconds("map"),
                "ensemble": lambda: seconds("ensemble", f"method.members={options.members}"),
            },
            rounds=options.rounds,
            progress=lambda line: print(line, file=sys.stderr),
        )
    ratios = [joint / one for one, joint in zip(found["one"], found["ensemble"], strict=True)]
    print(
        json.dumps(
            {
                "members": options.members,
                "ratio": round(statistics.median(ratios), 2),
                "seconds": {name: [round(value, 2) for value in values] for name, values in found.items()},
                "machine": f"{machine()}, {torch.get_num_threads()} threads",
            }
        )
    )


if __name__ == "__main__":
    main()
