"""What is in the folder of a run: its checkpoints, and what its rollouts were. Needs neither PyTorch nor TRL."""

import json
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


FOLDER = "rollouts"  # in a run's `output_dir`
# What a file of rollouts must have to be read again; `clipped` may be missing
NUMBERS, TEXTS = pa.list_(pa.float64()), pa.list_(pa.string())
TYPES = {"step": pa.int64(), "group": pa.int64(), "prompt": pa.string(), "reward": pa.float64()}
TYPES |= {"advantage": pa.float64(), "tokens": TEXTS, "logps": NUMBERS, "teacher_logps": NUMBERS}
CLIPPED = ("", "teacher", "policy")  # by what the clipping has dropped a token from the gradient


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or `None`. A killed run may leave a torn one."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: -int(path.name.partition("-")[2])):
        try:
            json.loads((folder / "trainer_state.json").read_text())  # what transformers writes last
            return str(folder)
        except (OSError, ValueError):
            warnings.warn(f"{folder} was not written to its end, so it is passed over.", stacklevel=2)
    return None


def read_rollouts(path: str | Path) -> list[dict]:
    """The records of a Parquet file, or of all those in the folder `rollouts` of a run. A file that was not written to
    its end, or has something else in it, is passed over with a warning."""
    path, records = Path(path), []
    for file in [path] if path.is_file() else sorted(path.glob(f"{FOLDER}/{FOLDER}_*.parquet")):
        try:
            records += _read(file)
        except (OSError, TypeError, ValueError, pa.ArrowException) as error:
            warnings.warn(f"{file} isn't a whole file of rollouts, so it is passed over: {error}", stacklevel=2)
    return records


def _read(file: Path) -> list[dict]:
    table, types = pq.read_table(file), TYPES | {"clipped": pa.list_(pa.int64())}
    if missing := TYPES.keys() - set(table.column_names):
        raise ValueError(f"it has no column {sorted(missing)[0]}")
    schema = pa.schema([(each.name, types.get(each.name, each.type)) for each in table.schema])
    records = table.cast(schema).to_pylist()
    for record in records:
        length = len(record["tokens"])
        clipped, teacher_logps = (record.get(name) or [None] * length for name in ("clipped", "teacher_logps"))
        record["teacher_logps"] = teacher_logps
        lengths = {length, len(record["logps"]), len(teacher_logps), len(clipped)}
        logps = record["logps"] + [x for x in teacher_logps if x is not None]
        values = [record[name] for name in TYPES if name not in ("reward", "teacher_logps")]
        is_whole = len(lengths) == 1 and None not in [*values, *record["tokens"], *record["logps"]]
        kinds = {None, *range(len(CLIPPED))}
        if not is_whole or not all(x <= 1.0 for x in logps) or not set(clipped) <= kinds:
            raise ValueError("not every token has what belongs to it")
    return records


def log_ratios(record: dict) -> list[float | None]:
    """log(student / teacher) at each token of a record, in nats, `None` where the teacher has scored nothing."""
    pairs = zip(record["logps"], record["teacher_logps"], strict=True)
    return [None if teacher is None else student - teacher for student, teacher in pairs]
