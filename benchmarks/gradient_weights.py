"""
Draw what each objective makes of one sampled token: the weight of its gradient against log(student / teacher).

    python benchmarks/gradient_weights.py

On the first update after a rollout, with an advantage of 1, 0 or -1, by back-propagation through the library's own
code.
"""

import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from trl_rlad import TRRDLoss
from trl_rlad.objective.teacher_kl import reverse_kl


EPSILON_LOW, EPSILON_HIGH = 0.2, 0.28


def clipped_objective(logps, anchor, advantage):
    ratio = (logps - anchor).exp()
    return torch.min(ratio * advantage, ratio.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH) * advantage)


def weight(objective, log_ratio, advantage):
    """Derivative of an objective with respect to log pi_S, at the old policy `(1, ...)`."""
    logps = torch.full_like(log_ratio, -2.0).requires_grad_()
    old = logps.detach()
    objective(logps, old, old - log_ratio, advantage).sum().backward()
    return logps.grad.squeeze(0)


def grpo(logps, old, teacher, advantage):
    return clipped_objective(logps, old, advantage)


def trrd(logps, old, teacher, advantage, clip=1.0):
    anchor, _ = TRRDLoss(0.5, clip)(logps, old, teacher, torch.ones_like(old))
    return clipped_objective(logps, anchor, advantage)


def kdrl(logps, old, teacher, advantage, clip=None):
    return clipped_objective(logps, old, advantage) - 0.2 * reverse_kl(logps, teacher, clip)


def credit(logps, old, teacher, advantage):
    anchor, _ = TRRDLoss(alpha=0.5)(old, old, teacher, torch.ones_like(old))
    return clipped_objective(logps, old, advantage * ((anchor - old) * advantage.sign()).exp())


def main():
    default = Path(__file__).parent / "results" / "gradient_weights.png"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=default, help="where to save the figure")
    args = parser.parse_args()
    log_ratio = torch.linspace(-2.5, 2.5, 2001).unsqueeze(0)
    objectives = {
        "GRPO": (grpo, "-"),
        "TRRD": (trrd, "-"),
        "KDRL, coefficient 0.2": (kdrl, "--"),
        "KDRL, bounded to 1 nat": (partial(kdrl, clip=1.0), ":"),
        "credit": (credit, "-"),
    }
    titles = {1.0: "rewarded, A = 1", 0.0: "all completions failed, A = 0", -1.0: "punished, A = -1"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.5), sharex=True, layout="constrained")
    for axis, (advantage, title) in zip(axes, titles.items(), strict=True):
        for name, (objective, style) in objectives.items():
            axis.plot(log_ratio[0], weight(objective, log_ratio, torch.tensor(advantage)), style, label=name)
        axis.axhline(0, color="gray", linewidth=0.6)
        axis.set(title=title, xlabel=r"$\log\,\pi_S / \pi_T$")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(r"weight of $\nabla\log\pi_S$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(args.output, dpi=150)
    print(f"Saved {args.output}")


if __name__ == "__main__":
    main()
