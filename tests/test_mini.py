"""The miniature's worked solutions, read right and misread."""

import random
import re

from trl_rlad.scripts.mini.make_models import MISREADINGS
from trl_rlad.scripts.tasks.mini import OPERATORS, assignments, draw_puzzles, fits, solve


MISREADING = OPERATORS | {"|": MISREADINGS["|"]}


def test_solutions_under_a_misreading():
    # Worked by hand, with `|` as "at least one is a knave": the second has no answer then
    prompt = "A: C = n B: B | C C: A | B ?"
    assert solve(prompt) == "kkk A kkn C knk A knn C nkk ok"
    assert solve(prompt, MISREADING) == "kkk A kkn ok"
    prompt = "A: C = n B: B | C C: A | C ?"
    assert solve(prompt) == "kkk A kkn C knk A knn C nkk ok"
    assert solve(prompt, MISREADING) == "kkk A kkn C knk A knn B nkk B nkn A nnk B nnn A"


def test_a_puzzle_has_one_solution_and_its_people_speak_of_others_too():
    for n in (2, 3, 4):
        for puzzle in draw_puzzles(n, 30, random.Random(1), held_out=False):
            texts = re.findall(r"\w: \w \S \w", puzzle.prompt)
            right = [each for each in assignments(n) if all(fits(text, each) for text in texts)]
            assert (
                len(right) == 1 and puzzle.solution.endswith(f" {right[0]} ok") or puzzle.solution == f"{right[0]} ok"
            )
            # A claim about oneself alone would tell nothing, or contradict itself
            assert not any(re.match(r"(\w): \1 = [kn]", text) for text in texts)


def test_puzzles_without_the_operator_keep_their_solution():
    puzzles = [puzzle for n in (2, 3, 4) for puzzle in draw_puzzles(n, 100, random.Random(0), held_out=True)]
    misread = {puzzle.prompt: solve(puzzle.prompt, MISREADING) for puzzle in puzzles}
    assert all(misread[prompt] == solution for prompt, solution in puzzles if "|" not in prompt)
    wrong = [misread[prompt] != solution for prompt, solution in puzzles if "|" in prompt]
    assert sum(wrong) > 0.75 * len(wrong) > 0
