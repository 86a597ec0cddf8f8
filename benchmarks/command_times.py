"""
How long `trl-rlad COMMAND --help` and `trl-rlad view RUN` take, beside the same of another checkout, in seconds: the
least of three. Writes `results/command_times.md`.

    python benchmarks/command_times.py outputs/mini-rlad --before ../a-checkout
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from trl_rlad.cli import COMMANDS


ROOT = Path(__file__).parent.parent


def seconds(checkout: Path, arguments: list[str]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "trl_rlad", *arguments]
        env = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        subprocess.run(command, env=env, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run with `--log_completions`")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    args = parser.parse_args()
    lines = {"trl-rlad --help": ["--help"]}
    lines |= {f"trl-rlad {command} --help": [command, "--help"] for command in COMMANDS}
    lines["trl-rlad view RUN"] = ["view", str(args.run), "--output", str(args.run / "view.html")]
    rows = [
        f"| `{line}` | {seconds(args.before, arguments):.2f} | {seconds(ROOT, arguments):.2f} |"
        for line, arguments in lines.items()
    ]
    text = f"""# Times of the commands

Seconds, the least of three (`python benchmarks/command_times.py RUN --before CHECKOUT`; {os.cpu_count()} CPU cores,
Python {sys.version.split()[0]}).

| | before | now |
|---|---|---|
""" + "\n".join(rows)
    (ROOT / "benchmarks" / "results" / "command_times.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
