"""
Measure a model on held-out puzzles, as `trl-rlad evaluate` does: see `trl_rlad/scripts/evaluate.py`.

    python examples/evaluate.py
    python examples/evaluate.py --model_name_or_path outputs/chains-rlad --output outputs/chains-rlad/evaluation.json
"""

from trl_rlad.scripts.evaluate import main


if __name__ == "__main__":
    main()
