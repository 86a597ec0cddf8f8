"""Rollouts as records: which are kept, how they are written and read. Without torch, which takes seconds to import."""

import warnings
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq


FOLDER = "_rollouts"  # in a run's `output_dir`: of what begins with `_`, transformers pushes nothing to the Hub
# What a file of rollouts must have to be read again
NUMBERS, TEXTS = pa.list_(pa.float64()), pa.list_(pa.string())
TYPES = {"step": pa.int64(), "group": pa.int64(), "prompt": pa.string(), "reward": pa.float64()}
TYPES |= {"advantage": pa.float64(), "tokens": TEXTS, "logps": NUMBERS, "teacher_logps": NUMBERS}
# What it may have: of each token, and of the completion
IDS = pa.list_(pa.int64())
OF_TOKENS = {"ids": IDS, "clipped": IDS, "part": NUMBERS, "named": pa.list_(TEXTS), "named_logps": pa.list_(NUMBERS)}
OF_ROWS = {"split": pa.string(), "kind": pa.string(), "teacher": pa.string(), "solved": pa.bool_(), "rewards": NUMBERS}
KNOWN = TYPES | OF_TOKENS | OF_ROWS | {"row": pa.int64()}
CLIPPED = ("", "teacher", "policy")  # by what the clipping has dropped a token from the gradient
KINDS = ("changed most", "failed", "solved", "random")  # why a group is kept
GROUPS = 2  # of each kind, in one file
TOKENS = 60_000  # in one file, which take less than 1 MB


def log_ratios(record: dict) -> list[float | None]:
    """log(student / teacher) at each token of a record, in nats, `None` where the teacher has scored nothing."""
    pairs = zip(record["logps"], record["teacher_logps"], strict=True)
    return [None if teacher is None else student - teacher for student, teacher in pairs]


def choose_groups(parts: Mapping[int, float], solved: Mapping[int, list[bool | None]], seed: int) -> dict[int, str]:
    """
    A few groups of each of `KINDS`. The failed are those without a success, the solved those without a failure.

    Args:
        parts (`Mapping[int, float]`):
            The size of the teacher's part in the loss of each group.
        solved (`Mapping[int, list[bool | None]]`):
            Whether each of its completions has succeeded; `None` where no reward function can judge.
        seed (`int`):
            Of the random ones.

    Returns:
        `dict[int, str]`: the kind of each group that is chosen.
    """
    by_part = sorted(parts, key=lambda group: -parts[group])
    failed = [group for group in by_part if False in solved[group] and True not in solved[group]]
    all_solved = [group for group in by_part if set(solved[group]) == {True}]
    chosen: dict[int, str] = {}
    for kind, groups in zip(
        KINDS, (by_part, failed, all_solved, Random(seed).sample(by_part, len(by_part))), strict=True
    ):
        chosen |= dict.fromkeys([group for group in groups if group not in chosen][:GROUPS], kind)
    return chosen


def write_rollouts(records: list[dict], path: Path):
    """Write records as Parquet, to be read by [`read_rollouts`]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for record in records for name in record)
    types = {name: _half(KNOWN[name]) for name in names}
    pq.write_table(pa.Table.from_pylist(records, schema=pa.schema(types)), path, compression="zstd")


def _half(kind: pa.DataType) -> pa.DataType:
    """The type that takes half the place."""
    if pa.types.is_list(kind):
        return pa.list_(_half(kind.value_type))
    return {pa.float64(): pa.float32(), pa.int64(): pa.int32()}.get(kind, kind)


def _fits(kind: pa.DataType, known: pa.DataType) -> bool:
    """Whether values of one type can be taken for those of the other."""
    if pa.types.is_list(kind) and pa.types.is_list(known):
        return _fits(kind.value_type, known.value_type)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) and pa.types.is_floating(known)
    is_number = is_number and (pa.types.is_integer(known) or pa.types.is_floating(known))
    return pa.types.is_null(kind) or kind == known or is_number


def read_rollouts(path: str | Path) -> list[dict]:
    """The records of a Parquet file, or of all those in a run's folder. A file that was not written to
    its end, or has something else in it, is passed over with a warning."""
    path, records = Path(path), []
    for file in [path] if path.is_file() else sorted(path.glob(f"{FOLDER}/rollouts_*.parquet")):
        try:
            records += _read(file)
        except (OSError, TypeError, ValueError, pa.ArrowException) as error:
            warnings.warn(f"{file} isn't a whole file of rollouts, so it is passed over: {error}", stacklevel=2)
    return records


def _read(file: Path) -> list[dict]:
    table = pq.read_table(file)
    if missing := TYPES.keys() - set(table.column_names):
        raise ValueError(f"it has no column {sorted(missing)[0]}")
    for each in table.schema:
        if each.name in KNOWN and not _fits(each.type, KNOWN[each.name]):
            raise TypeError(f"its column {each.name} has the type {each.type}")
    records = table.to_pylist()
    for record in records:
        length = len(record["tokens"])
        teacher_logps = record["teacher_logps"] = record["teacher_logps"] or [None] * length
        optional = [record[name] for name in OF_TOKENS if record.get(name)]
        lengths = {length, len(record["logps"]), len(teacher_logps), *map(len, optional)}
        logps = record["logps"] + [x for x in teacher_logps if x is not None]
        values = [record[name] for name in TYPES if name not in ("reward", "teacher_logps")]
        parts = record.get("part") or []
        is_whole = len(lengths) == 1 and None not in [*values, *record["tokens"], *record["logps"], *parts]
        kinds = {None, *range(len(CLIPPED))}
        numbers = [*logps, *parts, record["advantage"], record["reward"] or 0.0]
        numbers += filter(None, record.get("rewards") or [])
        if (
            not is_whole
            or not all(map(isfinite, numbers))
            or not all(x <= 1.0 for x in logps)
            or not set(record.get("clipped") or ()) <= kinds
        ):
            raise ValueError("not every token has what belongs to it")
    return records
