"""
The objective of RLAD, apart from any trainer: pure functions on tensors.

- `schedule`: which terms the loss has at a step ([`Objective`], [`Terms`])
- `guidance`: what they change in GRPO's loss of a micro-batch ([`guide`])
- `trrd`: the anchor of the likelihood ratio ([`TRRDLoss`])
- `teacher_kl`: the divergence from the teacher
- `clipping`: what the clipping drops from the gradient
"""
