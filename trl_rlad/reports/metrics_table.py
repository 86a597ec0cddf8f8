"""What to see of a run in the terminal or a notebook."""

from statistics import mean

from transformers import TrainerCallback


ROWS = (
    "reward frac_reward_zero_std completions/mean_length entropy teacher/log_ratio teacher/log_ratio_rewarded "
    "teacher/log_ratio_punished teacher/clamped teacher/kl teacher/entropy teacher/top1 clip_ratio/high_by_teacher "
    "clip_ratio/low_by_teacher clip_ratio/high_by_policy clip_ratio/low_by_policy step_time generation_time "
    "teacher/scoring_time"
).split()


class MetricsTable(TrainerCallback):
    """
    Prints what matters of a run with a teacher as a small table every so many steps: the mean since the last table,
    and the change from that one; in a notebook in the place of that one. Needs `rich`.

    Args:
        steps (`int`, *optional*, defaults to `10`):
            How often, in steps of training. Not more often than there are logs, see `logging_steps`.

    Example:

    ```python
    >>> trainer.add_callback(MetricsTable(steps=20))  # doctest: +SKIP
    ```
    """

    def __init__(self, steps: int = 10):
        self.steps, self.next_step = steps, steps
        self.logs: list[dict] = []
        self.before: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.next_step = state.global_step + self.steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "reward" not in logs:  # of an evaluation, or of the end
            return
        self.logs.append(logs)
        if state.global_step >= self.next_step:
            self._print(state)
            self.next_step, self.logs = state.global_step + self.steps, []

    def _print(self, state):
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"Step {state.global_step} of {state.max_steps}", title_justify="left", box=None)
        for column, side in (("", "left"), ("mean", "right"), ("change", "right")):
            table.add_column(column, justify=side)
        now = {}
        for name in ROWS:
            values = [logs[name] for logs in self.logs if logs.get(name) is not None]
            if values:
                now[name] = mean(values)
                change = f"{now[name] - self.before[name]:+.3f}" if name in self.before else ""
                table.add_row(name, f"{now[name]:.3f}", change)
        self.before = now
        console = Console()
        if console.is_jupyter:
            from IPython.display import clear_output

            clear_output(wait=True)
        console.print(table)
