"""
Where a teacher's log-probabilities come from.

A teacher has one duty, `score(prompts, completions, top_k)`: given token sequences, return the log-probability of each
completion token and, where asked, the likeliest tokens in its place. It never hears of rewards, advantages or ratios.

- `teacher`: what a teacher is; `create`: which one the settings ask for
- `contract`: what it must agree on with the student; `by_text`: what it reads if its tokenizer is another
- `local`, `sharded`, `adapters`, `own`: teachers in these processes; `loading`: how they are read from disk
- `server`, `client`: teachers behind a URL
"""

from .by_text import TextContract
from .client import ServerError
from .contract import TokenContract
from .create import check_settings_of_servers, create_teacher
from .local import LocalTeacher
from .own import OwnBaseTeacher, OwnTeacher
from .server import ServedTeacher
from .sharded import FSDPTeacher, ZeRO3Teacher
from .teacher import Teacher, TokenScores
