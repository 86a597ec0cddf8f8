"""`trl-rlad evaluate`."""

from ..scripts import evaluate
from ..scripts.arguments import run_command


def main(arguments: list[str]):
    run_command(evaluate.prepare, evaluate.run, arguments)
