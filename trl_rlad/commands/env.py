"""The versions that an issue should name."""

from argparse import ArgumentParser
from importlib.metadata import version


# What TRL's own list leaves out: this package's extras, and what asks a served teacher
OTHERS = ("httpx2", "tenacity", "reasoning-gym", "math-verify")


def main(arguments: list[str]):
    """Print what `trl env` prints, and this package's own version and commit."""
    ArgumentParser(prog="trl-rlad env", description=__doc__).parse_args(arguments)
    from trl.scripts.env import print_env
    from trl.scripts.utils import get_git_commit_hash

    from ..model_card import find_version

    print_env()
    commit = get_git_commit_hash("trl_rlad")  # an error in words where git refuses
    print(f"- trl-rlad version: {version('trl-rlad')}{f'+{commit[:7]}' if commit else ''}")
    for name in OTHERS:
        print(f"- {name} version: {find_version(name) or 'not installed'}")
