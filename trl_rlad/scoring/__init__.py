"""
From rollouts to the teacher's log-probabilities, and back.

- `rows`: what a teacher scores, a prompt and a completion without padding
- `scorer`: a padded batch to rows and back, each row by its own teacher ([`TeacherScorer`])
- `row_scorer`: the rows of one teacher, over all processes, in micro-batches
- `served`: the rows of a teacher behind a URL
- `watchdog`: a time limit that names the process that is stuck
"""

from .row_scorer import RowScorer
from .scorer import TeacherScorer
from .served import ServedRowScorer
