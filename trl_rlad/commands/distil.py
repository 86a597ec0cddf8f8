"""`trl-rlad distil`."""

from ..scripts import distil
from ..scripts.arguments import run_command


def main(arguments: list[str]):
    run_command(distil.prepare, distil.run, arguments)
