"""
What is seen of a student and a teacher before and after training. Nothing else imports it.

- `probe`, `probe_run`, `probe_output`: rollouts of a script's own trainer, their figures and advice, before training
- `view`: rollouts and curves as one HTML page
- `metrics_table`: the metrics that matter, in the terminal
"""
