"""
Ten questions of a newcomer to the site's own search, worked out and not timed: a click and two seconds for each place,
the way back included, and four words read a second, until the words that answer. A page is left after 300 words.
Writes `results/questions.md`. Needs Node, and two built sites (`mkdocs build -d FOLDER`).

    python benchmarks/questions.py BEFORE NOW
"""

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path


ROOT = Path(__file__).parent.parent
QUESTIONS = {  # what is typed, and what answers it
    "what is alpha": "weight of the old policy",
    "another tokenizer": "with another tokenizer",
    "reward doesn't rise": "share of groups whose rewards are all alike",
    "out of memory": "teacher_tokens_per_batch=8192",
    "resume": "--resume_from_checkpoint",
    "log_ratio": r"mean of log\(student / teacher\)",
    "wandb": "report_to",
    "two GPUs for the teacher": "CUDA_VISIBLE_DEVICES=1",
    "DistillationTrainer": "leave out reward_funcs",
    "push to hub": "--push_to_hub",
    "which method": "offline distillation",
}
LIMIT, RESULTS = 300, 5


def walk(site: Path) -> list[str]:
    """For each question, the clicks and seconds, and where it ends."""
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    command = ["node", ROOT / "tests" / "site_search.js", site, *QUESTIONS]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    cells = []
    for answer, places in zip(QUESTIONS.values(), found, strict=True):
        clicks, words = 1, 0
        for place in places[:RESULTS]:
            clicks += 1
            start = next(i for i, each in enumerate(index) if each["location"] == place)
            page = place.partition("#")[0]
            texts = (f"{d['title']} {d['text']}" for d in index[start:] if d["location"].partition("#")[0] == page)
            text = unescape(re.sub(r"<[^>]+>", "", " ".join(texts)))
            read = text.split()[:LIMIT]
            match = re.search(answer, " ".join(read), re.IGNORECASE)
            if match:
                words += len(" ".join(read)[: match.end()].split())
                cells.append(f"{clicks} clicks, {2 * clicks + words / 4:.0f} s | `{place or 'index'}`")
                break
            words, clicks = words + len(read), clicks + 1
        else:
            cells.append(f"not in {RESULTS} results | ")
    return cells


def main():
    before, now = (walk(Path(site)) for site in sys.argv[1:])
    rows = [f"| {question} | {a} | {b} |" for question, a, b in zip(QUESTIONS, before, now, strict=True)]
    text = (
        "# A newcomer's questions\n\nWorked out by `python benchmarks/questions.py BEFORE NOW`: nobody was timed.\n\n"
    )
    text += "| typed into the search | before | where | now | where |\n|---|---|---|---|---|\n" + "\n".join(rows)
    (ROOT / "benchmarks" / "results" / "questions.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
