"""
The offline baseline: a teacher answers the training puzzles, and the student imitates its right answers, as
`trl-rlad distil` does: see `trl_rlad/scripts/distil.py`.

    python examples/offline_distillation.py
"""

from trl_rlad.scripts.distil import main


if __name__ == "__main__":
    main()
