"""The metric of sampled answers."""

from math import comb


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    r"""
    Estimate the probability that at least one of `k` samples is correct, from `num_samples` of them.

    It is the share of all subsets of size `k` that have a correct sample in them, \\( 1 - \binom{n-c}{k} /
    \binom{n}{k} \\), which is unbiased ([Chen et al., 2021](https://huggingface.co/papers/2107.03374)). With `k=1` it
    is the mean.

    Args:
        num_samples (`int`):
            Number of samples.
        num_correct (`int`):
            Number of those that are correct.
        k (`int`):
            Size of the subsets, at most `num_samples`.

    Returns:
        `float`

    Raises:
        `ValueError`: if `k` is not in `[1, num_samples]` or `num_correct` not in `[0, num_samples]`.

    Example:

    ```python
    >>> pass_at_k(num_samples=4, num_correct=1, k=2)
    0.5
    ```
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be from 1 to `num_samples` = {num_samples}, but is {k}. Draw more samples.")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"`num_correct` must be from 0 to `num_samples` = {num_samples}, but is {num_correct}.")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)
