"""
What `comparison.py` compares methods on: a task, a student, its teachers, and how many puzzles there are.

In knights and knaves (`trl_rlad/scripts/tasks/mini.py`) the *mistaken* student, that of `mini/knights.yaml`,
misreads one of the four operators, and is sure of it. The *hasty* student knows the task but has a habit that hides
it, so it is seldom right. The *sheltered* one is small and has hardly seen two of the operators, the *half*-learned
one was stopped in the middle of learning. The flawed teacher is right but for one operator: `&`, for the hasty and
the sheltered student `|`.

In chains of operators (`trl_rlad/scripts/tasks/chains.py`) a *half*-learned student does each of eight steps right
as a rule, and so seldom all of them: that of the main job is one. The *far* one has never seen a quarter of the
operators; *soft* is a half-learned student with a teacher that writes each digit in one of two forms. The flawed
teacher has three of the twenty operators wrong. Each is there as a GPT with learned positions and as a Qwen3.
Puzzles are fresh ones or, with a number at its end, a pool of so many, drawn by the seed of the run and the same for
every method.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import mean
from types import ModuleType

import torch
from datasets import concatenate_datasets
from transformers import AutoModelForCausalLM

from trl_rlad.evaluation import pass_at_k
from trl_rlad.scripts.arguments import MINI
from trl_rlad.scripts.mini.make_chains import make_chains_model
from trl_rlad.scripts.mini.make_models import COMPARISON
from trl_rlad.scripts.sampling import grade, sample
from trl_rlad.scripts.tasks import Task, chains, mini


PEOPLE = (2, 3, 4)
POOLS = (None, 256, 64)
ARCHITECTURES = ("gpt", "qwen3")
MAKERS = COMPARISON | {
    f"chains_{architecture}_{kind}": partial(make_chains_model, architecture, kind)
    for architecture in ARCHITECTURES
    for kind in ("strong", "flawed", "soft", "half", "soft_half", "far")
}


def make_knights(size: int, seed: int, held_out: bool):
    """Make puzzles of knights and knaves, as many for each number of people."""
    if held_out:
        return concatenate_datasets([mini.make_dataset([n], size // len(PEOPLE), seed, held_out) for n in PEOPLE])
    return mini.make_dataset(PEOPLE, size, seed, held_out)


@dataclass(frozen=True, eq=False)
class Bed:
    """
    Args:
        student (`str`):
            Name of a model, one that is committed in `examples/mini/` or can be made.
        teachers (`dict[str, str]`):
            Names of models, by what they are called in the study.
        task (`ModuleType`):
            The module of the task.
        make_dataset (`Callable`):
            Makes puzzles, from `size`, `seed` and `held_out`.
        sampling (`dict`):
            How the accuracy is measured.
        sizes (`tuple[int, int]`):
            Number of held-out puzzles on which it is, on the way and at the end.
        pool (`int`, *optional*):
            Number of puzzles that are trained on again and again. `None` takes new ones.
    """

    student: str
    teachers: dict[str, str]
    task: ModuleType = mini
    make_dataset: Callable = make_knights
    sampling: dict = field(default_factory=lambda: {"temperature": 0.6, "top_p": 0.95, "batch_size": 600})
    sizes: tuple[int, int] = (600, 600)
    pool: int | None = None

    def train_puzzles(self, size: int, seed: int):
        """The puzzles of a run: `size`, or those of the pool."""
        return self.make_dataset(size=self.pool or size, seed=seed, held_out=False)

    def prepare(self, teacher: str, output_dir: Path):
        """Make the student and a teacher, if they aren't there."""
        for name in (self.student, self.teachers[teacher]):
            if not (path := self.path(name, output_dir)).exists():
                MAKERS[name](path=path)

    @staticmethod
    def path(name: str, output_dir: Path) -> Path:
        return MINI / name if (MINI / name).exists() else output_dir / name

    def measure(self, model, at_end: bool = False):
        """
        Accuracy on held-out puzzles, always the same ones and with the same seed: by their difficulty, and by the
        operators that they have in them.
        """
        puzzles, marks = self._mark(model, self.sizes[at_end], 1)
        marks = [of_prompt[0] for of_prompt in marks]
        difficulties = list(puzzles["difficulty"])
        by_operator = {
            operator: mean(
                mark for mark, prompt in zip(marks, puzzles["prompt"], strict=True) if operator in prompt.split()
            )
            for operator in self.task.OPERATORS
        }
        by_difficulty = [
            mean(mark for mark, other in zip(marks, difficulties, strict=True) if other == each)
            for each in sorted(set(difficulties))
        ]
        return by_difficulty, by_operator

    def measure_pass(self, model, k: int = 16, prompts: int = 240) -> float:
        """Share of puzzles that are solved in at least one of `k` tries."""
        _, marks = self._mark(model, prompts, k)
        return mean(pass_at_k(k, sum(of_prompt), k) for of_prompt in marks)

    def _mark(self, model, size, num_samples):
        puzzles, was_training = _held_out(self.make_dataset, size), model.training
        length = self.task.MAX_COMPLETION_LENGTH
        with torch.random.fork_rng():
            completions = sample(model, list(puzzles["prompt"]), num_samples, max_new_tokens=length, **self.sampling)
        model.train(was_training)
        return puzzles, grade(Task(None, puzzles, self.task.correctness_reward), puzzles, completions)

    @cache  # noqa: B019
    def measure_before(self, output_dir: Path):
        """Accuracy before any training."""
        return self.measure(AutoModelForCausalLM.from_pretrained(self.path(self.student, output_dir)))


@cache
def _held_out(make_dataset, size):
    return make_dataset(size=size, seed=0, held_out=True)


def make_chains_bed(architecture: str, student: str, pool: int | None = None) -> Bed:
    """Make the bed of a student by its architecture and kind, see `make_chains.py`."""
    names = {"strong": "soft" if student == "soft_half" else "strong", "flawed": "flawed"}
    return Bed(
        f"chains_{architecture}_{student}",
        {teacher: f"chains_{architecture}_{name}" for teacher, name in names.items()},
        chains,
        chains.make_dataset,
        {"temperature": 1.0, "batch_size": 2000},
        (1000, 4000),
        pool,
    )


BEDS = {
    "mistaken": Bed("student", {"strong": "teacher", "flawed": "flawed_teacher"}),
    "hasty": Bed("hasty_student", {"strong": "teacher", "flawed": "student"}),
    "sheltered": Bed("sheltered_student", {"strong": "teacher", "flawed": "student"}),
}
for pool in POOLS:
    suffix = f"_{pool}" if pool else ""
    BEDS[f"half{suffix}"] = Bed("half_student", {"strong": "teacher", "flawed": "flawed_teacher"}, pool=pool)
    for architecture in ARCHITECTURES:
        BEDS[f"half_{architecture}{suffix}"] = make_chains_bed(architecture, "half", pool)
for architecture in ARCHITECTURES:
    BEDS[f"far_{architecture}"] = make_chains_bed(architecture, "far")
    BEDS[f"soft_{architecture}"] = make_chains_bed(architecture, "soft_half")
