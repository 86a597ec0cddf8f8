"""
How long `trl-rlad COMMAND --help` and `trl-rlad view RUN` take, beside the same of another checkout: seconds of one
core, which other work on the machine hardly lengthens. Writes `results/command_times.md`.

    python benchmarks/command_times.py outputs/chains-rlad --before ../a-checkout
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from trl_rlad.cli import COMMANDS


ROOT = Path(__file__).parent.parent


def seconds(checkout: Path, arguments: list[str]) -> float:
    before = os.times()
    command = [sys.executable, "-m", "trl_rlad", *arguments]
    env = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    subprocess.run(command, cwd=checkout, env=env, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run with `--log_completions`")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    args = parser.parse_args()
    lines = {"trl-rlad --help": ["--help"]}
    lines |= {f"trl-rlad {command} --help": [command, "--help"] for command in COMMANDS}
    lines["trl-rlad view RUN"] = ["view", str(args.run.resolve()), "--output", str(args.run.resolve() / "view.html")]
    rows = [
        f"| `{line}` | {seconds(args.before, arguments):.2f} | {seconds(ROOT, arguments):.2f} |"
        for line, arguments in lines.items()
    ]
    text = f"""# Times of the commands

Seconds of one core (`python benchmarks/command_times.py RUN --before CHECKOUT`; Python {sys.version.split()[0]}).

| | before | now |
|---|---|---|
""" + "\n".join(rows)
    (ROOT / "benchmarks" / "results" / "command_times.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
