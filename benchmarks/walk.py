"""
A newcomer's walk, with times: an empty environment, the main job, the probe, the view, and a plain GRPO script that is
converted by the diff of docs/migrating.md (on the models and puzzles of `trl_rlad/scripts/mini`, as no Hub is asked).
Writes `results/walk.md`.

    python benchmarks/walk.py
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path


ROOT = Path(__file__).parent.parent
MINI = ROOT / "trl_rlad" / "scripts" / "mini"
TASK = "from trl_rlad.scripts.tasks.mini import"
OFFLINE = {
    "from datasets import load_dataset": f"{TASK} make_dataset",
    "from trl.rewards import accuracy_reward": f"{TASK} correctness_reward as accuracy_reward",
    'load_dataset("trl-lib/DeepMath-103K", split="train")': "make_dataset([2, 3], 400, 0, False)",
    "Qwen/Qwen3-0.6B": str(MINI / "student"),
    "Qwen/Qwen3-8B": str(MINI / "teacher"),
    "num_generations=8": "num_generations=8, max_completion_length=33, max_steps=20, use_cpu=True, bf16=False",
}
STEPS = {
    "an empty environment": 'python -m venv {venv} && {bin}/pip install -q -c constraints.txt ".[tasks,see]"',
    "the probe": "{bin}/trl-rlad probe --sample_teacher train --output_dir {out}/probe",
    "the main job": "{bin}/trl-rlad train --log_completions --output_dir {out}/rlad",
    "the view": "{bin}/trl-rlad view {out}/rlad",
    "a plain GRPO script": "{bin}/python {out}/grpo.py",
    "the diff": "patch -o {out}/rlad.py {out}/grpo.py {out}/migrating.diff",
    "the script converted": "{bin}/python {out}/rlad.py",
}


def write_script(folder: Path):
    """The plain script of docs/migrating.md, and the diff."""
    diff = re.search("```diff\n(.*?)```", (ROOT / "docs" / "migrating.md").read_text(), re.DOTALL)[1]
    for there, here in OFFLINE.items():
        diff = diff.replace(there, here)
    lines = diff.splitlines()
    before, after = (sum(not line.startswith(sign) for line in lines) for sign in "+-")
    (folder / "migrating.diff").write_text(f"--- grpo.py\n+++ rlad.py\n@@ -1,{before} +1,{after} @@\n{diff}")
    (folder / "grpo.py").write_text("".join(f"{line[1:]}\n" for line in lines if not line.startswith("+")))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        places = {"venv": f"{folder}/venv", "bin": f"{folder}/venv/bin", "out": folder}
        write_script(Path(folder))
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        rows = []
        for name, command in STEPS.items():
            start = time.perf_counter()
            subprocess.run(command.format(**places), shell=True, cwd=ROOT, env=env, check=True)
            rows.append(
                f"| {name} | `{command.format(venv='.venv', bin='.venv/bin', out='outputs')}` | "
                f"{time.perf_counter() - start:.0f} s |"
            )
            print(rows[-1], flush=True)
    text = f"""# A newcomer's walk

`python benchmarks/walk.py` on {date.today():%d %B %Y}, {os.cpu_count()} CPU cores, Python {sys.version.split()[0]}.

| | command | |
|---|---|---|
""" + "\n".join(rows)
    (ROOT / "benchmarks" / "results" / "walk.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
