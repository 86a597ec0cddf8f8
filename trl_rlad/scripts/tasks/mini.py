"""
Knights and knaves in miniature: a reasoning task small enough for a 100K-parameter model on a CPU.

Each of two to four people makes one claim; knights (`k`) tell the truth and knaves (`n`) lie. Every puzzle has exactly
one answer. A claim about one person is `B = k` or `B = n` (B is a knight, a knave); a claim about two is `A = C` (they
are of the same kind), `A / C` (of different kinds), `A & C` (both are knights) or `A | C` (at least one is a knight).

    prompt    A: C = n B: B | C C: A | C ?
    solution  kkk A kkn C knk A knn C nkk ok

The worked solution tries the assignments of roles in order, names the first person whose claim contradicts each, and
stops with `ok` at the one that nobody contradicts. An assignment is a single token, so the longest solution, with four
people, takes 32 tokens and the end-of-sequence token.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice, permutations, product
from operator import and_, eq, ne, or_
from typing import NamedTuple
from zlib import crc32

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from .task import Task


NAMES = "ABCD"
ROLES = "kn"
Operators = dict[str, Callable[[bool, bool], bool]]
OPERATORS: Operators = {"=": eq, "/": ne, "&": and_, "|": or_}
PAD, EOS = "<pad>", "<eos>"
MAX_COMPLETION_LENGTH = 2 * 2 ** len(NAMES) + 1
HELD_OUT_SHARE = 4  # one puzzle in so many is held out


class Statement(NamedTuple):
    """What one person says, and the assignments of roles under which that person may say it."""

    text: str
    fits: frozenset[str]


class Puzzle(NamedTuple):
    """A puzzle and its worked solution."""

    prompt: str
    solution: str


@cache
def assignments(n_people: int) -> list[str]:
    """Every way to make `n_people` people knights or knaves, in the order in which a solution tries them."""
    return ["".join(roles) for roles in product(ROLES, repeat=n_people)]


def fits(text: str, assignment: str, operators: Operators = OPERATORS) -> bool:
    """Whether the statement `text` may be made if everybody is as `assignment` has it."""
    speaker, first, operator, second = text.split()
    is_knight = {name: role == "k" for name, role in zip(ROLES + NAMES, ROLES + assignment, strict=False)}
    return is_knight[speaker[0]] == operators[operator](is_knight[first], is_knight[second])


@cache
def statements(n_people: int, speaker: str) -> list[Statement]:
    """Everything that `speaker` may ever say among `n_people` people."""
    people = NAMES[:n_people]
    claims = [(person, "=", role) for person in people if person != speaker for role in ROLES]
    claims += [(first, operator, second) for first, second in permutations(people, 2) for operator in OPERATORS]
    texts = [f"{speaker}: {' '.join(claim)}" for claim in claims]
    return [Statement(text, frozenset(a for a in assignments(n_people) if fits(text, a))) for text in texts]


@cache
def fitting_statements(n_people: int, speaker: str, assignment: str) -> list[Statement]:
    """What `speaker` may say if everybody is as `assignment` has it."""
    return [statement for statement in statements(n_people, speaker) if assignment in statement.fits]


def solve(prompt: str, operators: Operators = OPERATORS) -> str:
    """Work out the solution of a puzzle. Misread, with other `operators`, a puzzle may have none, and so no `ok`."""
    texts = re.findall(r"\w: \w \S \w", prompt)
    steps = []
    for assignment in assignments(len(texts)):
        steps += [assignment, next((text[0] for text in texts if not fits(text, assignment, operators)), "ok")]
        if steps[-1] == "ok":
            break
    return " ".join(steps)


def draw_puzzle(n_people: int, rng: random.Random) -> Puzzle:
    """Draw one puzzle with exactly one solution."""
    # The answer comes first: unbalanced, "all knights" and "all knaves" would be good guesses.
    answer = rng.choice(assignments(n_people))
    people = NAMES[:n_people]
    while True:
        said = [rng.choice(fitting_statements(n_people, speaker, answer)) for speaker in people]
        if len(frozenset.intersection(*(statement.fits for statement in said))) == 1:
            break
    prompt = " ".join([*(statement.text for statement in said), "?"])
    return Puzzle(prompt, solve(prompt))


def is_held_out(prompt: str) -> bool:
    """Whether a puzzle belongs to the held-out split; it depends on the puzzle alone, so the splits never overlap."""
    return crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def draw_puzzles(n_people: int, size: int, rng: random.Random, held_out: bool) -> list[Puzzle]:
    """
    Draw `size` puzzles of one split. They repeat only if the split has fewer: with two people there are 38 to train on
    and 18 held out, with three 6,120 and 2,048, with four plenty.
    """
    distinct = {}
    for _ in range(8 * size + 2000):
        puzzle = draw_puzzle(n_people, rng)
        if is_held_out(puzzle.prompt) == held_out:
            distinct[puzzle.prompt] = puzzle
        if len(distinct) == size:
            break
    return list(islice(cycle(distinct.values()), size))


def make_dataset(n_people: Sequence[int], size: int, seed: int, held_out: bool) -> Dataset:
    """Make `size` puzzles, as many for each of `n_people`, with `prompt`, `solution` and `difficulty` (the people)."""
    rng = random.Random(seed)
    rows = []
    for index, n in enumerate(n_people):
        share = size // len(n_people) + (index < size % len(n_people))
        for puzzle in draw_puzzles(n, share, rng, held_out):
            rows.append({"prompt": puzzle.prompt, "solution": puzzle.solution, "difficulty": n})
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def correctness_reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """Reward 1.0 for the worked solution, every step of it right, and 0.0 for anything else."""
    # The answer alone could be guessed: rewarded for it, a weak student learns to guess instead of to reason. A
    # completion cut short lacks the final `ok`, so it earns nothing.
    return [float(completion.strip() == worked) for completion, worked in zip(completions, solution, strict=True)]


def load_mini(train_size: int, eval_size: int = 0, seed: int = 0, task_kwargs: dict | None = None) -> Task:
    """Make the task. Its one setting is `n_people`, a list of some of 2, 3 and 4; by default all of them."""
    task_kwargs = task_kwargs or {}
    n_people = task_kwargs.get("n_people", [2, 3, 4])
    if task_kwargs.keys() - {"n_people"} or not isinstance(n_people, list) or not {2, 3, 4} >= set(n_people) > set():
        raise ValueError(
            "`--task_kwargs` of the mini task are one, `n_people`, a list of some of 2, 3 and 4, and not "
            f"{json.dumps(task_kwargs)}."
        )
    train_dataset = make_dataset(n_people, train_size, seed, held_out=False)
    return Task(train_dataset, make_dataset(n_people, eval_size, seed, held_out=True), correctness_reward)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the word-level tokenizer that teacher and student share."""
    words = [PAD, EOS, "?", "ok", *NAMES, *(f"{name}:" for name in NAMES), *OPERATORS]
    words += [assignment for n_people in range(1, len(NAMES) + 1) for assignment in assignments(n_people)]
    return make_word_tokenizer(words)


def make_word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer of these words, `PAD` and `EOS` among them, with their places as ids."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,  # or `A ?` would become `A?`
    )
