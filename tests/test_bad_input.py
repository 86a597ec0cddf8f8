"""
Bad input is refused before any training, in a sentence that names the setting and the remedy.

The table below is that of `docs/bad_input.md`, which `python tests/test_bad_input.py` writes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ByT5Tokenizer
from trl import GRPOConfig

from trl_rlad import RLADTrainer, TRRDLoss
from trl_rlad.scripts import distil, evaluate, train


ROOT = Path(__file__).parents[1]


DOCS = ROOT / "docs" / "bad_input.md"
HEAD = """# Bad input

What is refused before training starts, and what the message names. One test walks this table; `python
tests/test_bad_input.py` writes it.

| where | what | the message names |
|---|---|---|
"""


class Case(NamedTuple):
    """Something that is refused."""

    where: str
    what: str
    cause: Callable
    names: tuple[str, ...]


CASES: list[Case] = []


def refused(where, what, *names):
    """Register what causes the refusal, a function of the `Place` in which it runs."""

    def register(cause):
        CASES.append(Case(where, what, cause, names))
        return cause

    return register


class Place:
    """Where a case runs: a folder, a student, a teacher, and what makes a trainer of them."""

    def __init__(self, folder: Path, student: str, teacher: str, monkeypatch):
        self.folder, self.student, self.teacher, self.monkeypatch = folder, student, teacher, monkeypatch

    def trainer(self, teacher="", dataset=None, args=None, student=None, trainer_kwargs=None, **kwargs):
        args = args or tiny.make_config(self.folder / "out", **kwargs)
        options = {"teacher_model": self.teacher if teacher == "" else teacher} | (trainer_kwargs or {})
        dataset = tiny.make_dataset() if dataset is None else dataset
        return RLADTrainer(student or self.student, tiny.reward, args, dataset, **options)

    def copy_of_teacher(self, **kwargs):
        folder = self.folder / "damaged"
        tiny.save_model(folder, seed=1, **kwargs)
        return folder

    def make_adapter(self, name="adapter", damaged=False, config=None):
        config = config or LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(self.teacher), config).save_pretrained(self.folder / name)
        if damaged:
            path = self.folder / name / "adapter_model.safetensors"
            weights = dict(sorted(load_file(path).items())[1:])
            save_file(weights, path, {"format": "pt"})
        return self.folder / name

    def make_checkpoint(self):
        folder = self.folder / "out" / "checkpoint-5"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")

    def run(self, script, *arguments):
        arguments = [script.__file__, *arguments]
        if "--output_dir" not in arguments and script is not evaluate:
            arguments += ["--output_dir", str(self.folder / "out")]
        if "--task" in arguments:  # elsewhere the mini task's own file says so
            arguments += ["--use_cpu", "true", "--bf16", "false"]
        self.monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        script.main()


# The settings, each alone
nan, inf = float("nan"), float("inf")
SETTINGS = [
    ("alpha", -0.1, "[0, 1]"),
    ("alpha", 1.5, "[0, 1]"),
    ("alpha", nan, "[0, 1]"),
    ("alpha", "0.5", "must be a number"),
    ("alpha", True, "must be a number"),
    ("alpha", None, "must be a number"),
    ("teacher_log_ratio_clip", 0.0, "must be positive", "`teacher_log_ratio_clip=None` for no bound"),
    ("teacher_log_ratio_clip", -1.0, "must be positive"),
    ("teacher_log_ratio_clip", nan, "must be positive"),
    ("teacher_credit", "false", "must be True or False"),
    ("teacher_credit", 1, "must be True or False"),
    ("trim_padding", "no", "must be True or False"),
    ("distillation_fraction", 1.1, "[0, 1], a share of training"),
    ("distillation_fraction", nan, "[0, 1]"),
    ("distillation_fraction", None, "must be a number"),
    ("teacher_kl_coef", -0.1, "finite and not negative"),
    ("teacher_kl_coef", inf, "finite and not negative"),
    ("teacher_kl_coef", "0.5", "must be a number"),
    ("teacher_kl_coef_final", nan, "finite and not negative"),
    ("teacher_kl", "k1", "'reverse' or 'forward'", "doesn't contain the teacher"),
    ("teacher_kl", "k3", "'reverse' or 'forward'"),
    ("teacher_kl_on", "unsolved", "'all' or 'failed'"),
    ("teacher_top_k", 0, "at least 1", "`teacher_kl='reverse'`"),
    ("teacher_top_k", 2.5, "whole number"),
    ("success_reward", nan, "must be finite"),
    ("success_reward", inf, "must be finite"),
    ("success_reward", "0.5", "must be a number"),
    ("teacher_zero_stage", 2, "0 (whole on each process) or 3 (sharded)"),
    ("teacher_zero_stage", "3", "the number 0"),
    ("teacher_zero_stage", False, "the number 0"),
    ("teacher_offload", "disk", "'none' or 'cpu'"),
    ("teacher_server_urls", "localhost:8000", "an address such as 'http://localhost:8000'"),
    ("teacher_server_urls", "ftp://localhost", "an address such as"),
    ("teacher_server_urls", '["http://localhost', "an address such as"),
    ("teacher_server_urls", [], "an address such as"),
    ("teacher_server_urls", {}, "an address such as"),
    ("teacher_server_urls", {"math": None}, "an address such as"),
    ("teacher_server_urls", 8000, "an address such as"),
    ("teacher_server_urls", "http://:8000", "an address such as"),
    ("teacher_server_urls", "http://me:secret@localhost", "environment variable `VLLM_API_KEY`"),
    ("teacher_server_urls", "http://localhost?key=secret", "environment variable `VLLM_API_KEY`"),
    ("teacher_server_urls", "http://localhost:80000", "an address such as"),
    ("teacher_server_urls", "http://localhost:port", "an address such as"),
    ("teacher_server_urls", "http://[::1", "an address such as"),
    ("teacher_server_urls", "http://a..b", "an address such as"),
    ("teacher_server_urls", "http://local host", "an address such as"),
    ("teacher_server_urls", "http://localhost\n", "an address such as"),
    ("teacher_server_urls", "http://localhost#v1", "an address such as"),
    ("on_teacher_failure", "ignore", "'raise' or 'grpo'"),
    ("teacher_timeout", 0.0, "positive number of seconds"),
    ("teacher_timeout", 1e12, "at most 1000000"),
    ("teacher_timeout", nan, "positive number of seconds"),
    ("teacher_tokens_per_batch", 0, "whole number of at least 1"),
    ("teacher_tokens_per_batch", 1.5, "whole number"),
    ("teacher_tokens_per_batch", nan, "whole number"),
    ("teacher_tokens_per_batch", inf, "whole number"),
    ("teacher_tokens_per_batch", "9", "must be a number"),
    ("teacher_model_init_kwargs", 5, "must be a dictionary"),
    ("teacher_model_init_kwargs", {"device_map": "auto"}, "`teacher_zero_stage=3`"),
    ("teacher_model_init_kwargs", {"token": "hf_..."}, "`HF_TOKEN`"),
    ("teacher_model_init_kwargs", {"use_auth_token": "hf_..."}, "`HF_TOKEN`"),
    ("teacher_model_init_kwargs", {"torch_dtype": "bfloat16"}, "`dtype`"),
]
for setting, value, *names in SETTINGS:
    refused("settings", f"`{setting}={value!r}`", f"`{setting}`", *names)(
        lambda place, setting=setting, value=value: tiny.make_config(place.folder, **{setting: value})
    )


@refused("settings", "`teacher_credit=True, alpha=1.0`", "`teacher_credit`", "smaller `alpha`")
def _(place):
    tiny.make_config(place.folder, teacher_credit=True, alpha=1.0)


@refused("settings", "a `revision` in `teacher_model_init_kwargs`, and another", "`teacher_model_revision` alone")
def _(place):
    tiny.make_config(place.folder, teacher_model_init_kwargs={"revision": "main"}, teacher_model_revision="v1")


@refused("`TRRDLoss`", "`alpha=5`", "`alpha`", "[0, 1]")
def _(place):
    TRRDLoss(alpha=5)


@refused("`TRRDLoss`", "`teacher_log_ratio_clip=0`", "`teacher_log_ratio_clip`", "positive or `None`")
def _(place):
    TRRDLoss(teacher_log_ratio_clip=0)


# What is handed to the trainer


@refused("trainer", "no teacher", "`alpha=0.5` needs a teacher", "`teacher_model`", "set `alpha=1.0`")
def _(place):
    place.trainer(teacher=None)


@refused("trainer", '`teacher_model=""` (in YAML, by accident)', "`alpha=0.5` needs a teacher")
def _(place):
    RLADTrainer(place.student, tiny.reward, tiny.make_config(place.folder), tiny.make_dataset(), teacher_model="")


@refused("trainer", "`teacher_model={}`", "`alpha=0.5` needs a teacher")
def _(place):
    place.trainer(teacher={})


@refused("trainer", "a divergence from no teacher", "`teacher_kl_coef=0.1` needs a teacher")
def _(place):
    place.trainer(teacher=None, alpha=1.0, teacher_kl_coef=0.1)


@refused("trainer", "a divergence to come from no teacher", "`teacher_kl_coef_final=0.1` needs a teacher")
def _(place):
    place.trainer(teacher=None, alpha=1.0, teacher_kl_coef_final=0.1)


@refused("trainer", "distillation from no teacher", "`distillation_fraction=0.5` needs a teacher")
def _(place):
    place.trainer(teacher=None, alpha=1.0, distillation_fraction=0.5)


@refused("trainer", "`teacher=...`", "no argument `teacher`", "passed as `teacher_model`")
def _(place):
    place.trainer(trainer_kwargs={"teacher": place.teacher})


@refused("trainer", "`teacher_model=3`", "must be a name, a path or a `PreTrainedModel`")
def _(place):
    place.trainer(teacher=3)


@refused("trainer", "a `GRPOConfig`", "must be an `RLADConfig`")
def _(place):
    place.trainer(args=tiny.make_config(place.folder, GRPOConfig))


@refused("trainer", "the student as its own teacher", "shares its weights", 'pass "base"')
def _(place):
    model = tiny.make_model(0)
    place.trainer(student=model, teacher=model)


@refused("trainer", "the student as one of several teachers", "shares its weights", 'pass "base"')
def _(place):
    model = tiny.make_model(0)
    place.trainer(student=model, teacher={"a": place.teacher, "b": model})


@refused("trainer", '`teacher_model="base"` without an adapter', "trains an adapter", "`peft_config`")
def _(place):
    place.trainer(teacher="base")


@refused("trainer", '`teacher_offload` with `teacher_model="base"`', "`teacher_offload` has no meaning")
def _(place):
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    place.trainer(teacher="base", teacher_offload="cpu", trainer_kwargs={"peft_config": lora})


@refused("trainer", '`teacher_model="self"` without a `teacher_prompt`', "knows no more", "Add the column", "solution")
def _(place):
    place.trainer(teacher="self")


@refused("trainer", '`teacher_zero_stage` with `teacher_model="self"`', "`teacher_zero_stage` has no meaning")
def _(place):
    dataset = tiny.make_dataset().map(lambda row: {"teacher_prompt": f"w1 {row['prompt']}"})
    place.trainer(teacher="self", dataset=dataset, teacher_zero_stage=0)


@refused(
    "trainer", '`teacher_model="base"` of an initialization that changes it', "`init_lora_weights=", "of the base"
)
def _(place):
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    place.trainer(teacher="base", trainer_kwargs={"peft_config": lora})


@refused("trainer", '`teacher_model="base"` of which norms train', "norm.weight` of the base is trained", "freeze it")
def _(place):
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    student = get_peft_model(tiny.make_model(0), lora)
    student.base_model.model.model.norm.requires_grad_(True)
    student.config._name_or_path = place.student
    place.trainer(teacher="base", student=student)


@refused("trainer", '`teacher_model="base"` of which biases train', "move with the student", '`bias="none"`')
def _(place):
    student = tiny.make_model(0)
    student.model.layers[0].self_attn.q_proj = torch.nn.Linear(16, 16)  # tiny ones have no biases
    student.config._name_or_path = place.student
    lora = LoraConfig(target_modules=["q_proj"], r=2, bias="all")
    place.trainer(teacher="base", student=student, trainer_kwargs={"peft_config": lora})


@refused("trainer", "`teacher_server_urls` with `temperature=0.7`", "vLLM", "`temperature=1.0`", "`teacher_model`")
def _(place):
    place.trainer(teacher_server_urls="http://localhost:8000", temperature=0.7)


@refused("trainer", "`teacher_server_urls` by name beside one `teacher_model`", "Pass both as dictionaries")
def _(place):
    place.trainer(teacher_server_urls={"math": "http://localhost:8000"})


@refused("trainer", "`teacher_server_urls` and a model object", "`teacher_server_urls` or a model object, not both")
def _(place):
    place.trainer(teacher=tiny.make_model(1), teacher_server_urls="http://localhost:8000")


for idle in ({"teacher_offload": "cpu"}, {"teacher_zero_stage": 3}, {"teacher_model_init_kwargs": {"dtype": "auto"}}):
    setting = ", ".join(f"`{name}={value!r}`" for name, value in idle.items())
    refused("trainer", f"{setting} beside `teacher_server_urls`", "no effect on a teacher behind")(
        lambda place, idle=idle: place.trainer(teacher=None, teacher_server_urls="http://localhost:1", **idle)
    )


@refused("trainer", "`teacher_model='http://localhost:8000'`", "pass it as `teacher_server_urls`")
def _(place):
    place.trainer(teacher="http://localhost:8000")


@refused("trainer", "a `VLLM_API_KEY` that isn't ASCII", "`VLLM_API_KEY`", "can't be sent in a header")
def _(place):
    place.monkeypatch.setenv("VLLM_API_KEY", "op\u00e9n\nsesame")
    place.trainer(teacher=None, teacher_server_urls="http://localhost:1")


@refused("trainer", "`teacher_server_urls` of nobody", "localhost:1 gave no answer", "asked again and again")
def _(place):
    place.trainer(teacher_server_urls="http://localhost:1", teacher_timeout=0.4)


@refused("trainer", "`teacher_zero_stage=3` without DeepSpeed", "needs DeepSpeed", "zero*.yaml")
def _(place):
    place.trainer(teacher_zero_stage=3)


@refused("trainer", "a quantized teacher, offloaded", "A quantized teacher is whole", "`teacher_offload='none'`")
def _(place):
    place.trainer(teacher_offload="cpu", teacher_model_init_kwargs={"quantization_config": {}})


@refused("trainer", "an unknown keyword for the teacher", "`teacher_model_init_kwargs={'foo': 1}`")
def _(place):
    place.trainer(teacher_model_init_kwargs={"foo": 1})


@refused("trainer", "an `output_dir` that can't be written to", "`output_dir=", "can't be written to")
def _(place):
    place.trainer(args=tiny.make_config("/proc/self"))


@refused("settings", "`RLADConfig(..., alfa=0.5)`", "`RLADConfig` has no setting `alfa`", "Did you mean `alpha`?")
def _(place):
    tiny.make_config(place.folder / "out", alfa=0.5)


@refused("settings", '`RLADConfig(..., teacher_model="Qwen/Qwen3-8B")`', "passed to `RLADTrainer`, as `teacher_model`")
def _(place):
    tiny.make_config(place.folder / "out", teacher_model="Qwen/Qwen3-8B")


@refused(
    "trainer", "`RLADTrainer(..., eval_datasets=...)`", "no argument `eval_datasets`", "Did you mean `eval_dataset`?"
)
def _(place):
    place.trainer(trainer_kwargs={"eval_datasets": None})


# A student that isn't there: it would be found first if models were loaded before


@refused("dataset", "no column `prompt`", "`train_dataset` has no column `prompt`, but question", "rename_column(")
def _(place):
    place.trainer(dataset=tiny.make_dataset().rename_column("prompt", "question"), student="/no/such/student")


@refused("dataset", "no column `prompt` in an evaluation set", "`eval_dataset['hard']` has no column `prompt`")
def _(place):
    sets = {"easy": tiny.make_dataset(), "hard": tiny.make_dataset().rename_column("prompt", "question")}
    place.trainer(trainer_kwargs={"eval_dataset": sets}, student="/no/such/student")


@refused("trainer", "a reward function without `**kwargs`", "`right` can't be called", "others as `**kwargs`")
def _(place):
    def right(completions):
        return [0.0] * len(completions)

    RLADTrainer(
        "/no/such/student", right, tiny.make_config(place.folder / "out"), tiny.make_dataset(), teacher_model="t"
    )


@refused(
    "trainer", "a reward function of a column that isn't there", "missing a required argument: 'answer'", "prompts,"
)
def _(place):
    def right(completions, answer, **kwargs):
        return [0.0] * len(completions)

    args = tiny.make_config(place.folder / "out")
    RLADTrainer("/no/such/student", [tiny.reward, right], args, tiny.make_dataset(), teacher_model="t")


@refused("dataset", "`teacher_weight` of 1.5", "`teacher_weight`", "[0, 1]", "row 0 has 1.5")
def _(place):
    dataset = tiny.make_dataset()
    place.trainer(dataset=dataset.add_column("teacher_weight", [1.5] * len(dataset)))


@refused("dataset", "`teacher_weight` as text", "column `teacher_weight` must be", "row 0 has '1.0'")
def _(place):
    place.trainer(dataset=tiny.make_dataset(4).add_column("teacher_weight", ["1.0"] * 4))


@refused("dataset", "`teacher_weight` as a list", "column `teacher_weight` must be", "row 0 has [1.0]")
def _(place):
    place.trainer(dataset=tiny.make_dataset(4).add_column("teacher_weight", [[1.0]] * 4))


@refused("dataset", "`teacher_prompt` as a number", "column `teacher_prompt` must be text or messages", "row 0 has 3")
def _(place):
    place.trainer(dataset=tiny.make_dataset(4).add_column("teacher_prompt", [3] * 4))


@refused("dataset", "an empty `teacher_prompt`", "column `teacher_prompt` must be", "`None`", "row 1 has ''")
def _(place):
    place.trainer(dataset=tiny.make_dataset(4).add_column("teacher_prompt", ["w1", "", None, "w2"]))


@refused("dataset", "`teacher_id` as a `ClassLabel`", "`teacher_id` has 0 in row 0", "from `ClassLabel` to strings")
def _(place):
    data = tiny.make_dataset(4).add_column("teacher_id", ["a"] * 4).class_encode_column("teacher_id")
    place.trainer(teacher={"a": place.teacher}, dataset=data)


@refused("dataset", "a `teacher_weight` of 2 in an evaluation set", "column `teacher_weight` must be in [0, 1]")
def _(place):
    data = tiny.make_dataset(4).add_column("teacher_weight", [1.0, 1.0, 2.0, 1.0])
    place.trainer(trainer_kwargs={"eval_dataset": {"easy": tiny.make_dataset(4), "hard": data}})


@refused("dataset", "prompts of an evaluation set longer than the teacher's positions", "64 positions")
def _(place):
    data = Dataset.from_list([{"prompt": " ".join(["w1"] * 60)}] * 4)
    teacher = str(place.copy_of_teacher(positions=64))
    place.trainer(teacher=teacher, trainer_kwargs={"eval_dataset": data}, max_completion_length=8)


@refused(
    "dataset", "prompts and completions longer than the teacher's positions", "64 positions", "`max_completion_length`"
)
def _(place):
    place.trainer(teacher=str(place.copy_of_teacher(positions=64)), max_completion_length=62)


@refused("dataset", "several teachers, and no column `teacher_id`", "each row", "`teacher_id`", "The columns are")
def _(place):
    place.trainer(teacher={"a": place.teacher})


@refused("dataset", "a `teacher_id` that is no teacher", "`teacher_id` has 'b' in row 0", "They are 'a'")
def _(place):
    dataset = tiny.make_dataset()
    place.trainer(teacher={"a": place.teacher}, dataset=dataset.add_column("teacher_id", ["b"] * len(dataset)))


# Teachers


@refused("teacher", "a folder that isn't there", "`teacher_model='/no/such/folder'`", "There is no such folder")
def _(place):
    place.trainer(teacher="/no/such/folder")


@refused("teacher", "a name that isn't on the Hub", "`teacher_model='no/such-model'` can't be loaded")
def _(place):
    place.trainer(teacher="no/such-model")


@refused("teacher", "missing weights: the head", "`teacher_model=", "weights are missing", "lm_head.weight")
def _(place):
    folder = place.copy_of_teacher()
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    place.trainer(teacher=str(folder))


@refused("teacher", "missing weights: a layer", "`teacher_model=", "weights are missing", "model.layers.1.")
def _(place):
    folder = place.copy_of_teacher()
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if ".layers.1." not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    place.trainer(teacher=str(folder))


@refused("teacher", "weights of other shapes", "`teacher_model=")
def _(place):
    folder = place.copy_of_teacher()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    place.trainer(teacher=str(folder))


@refused("teacher", "NaN among the weights", "`teacher_model`", "aren't finite", "q_proj")
def _(place):
    folder = place.copy_of_teacher()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    place.trainer(teacher=str(folder))


@refused("teacher", "a weights file cut short", "`teacher_model=", "can't be loaded")
def _(place):
    path = place.copy_of_teacher() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    place.trainer(teacher=str(path.parent))


@refused("teacher", "a git-lfs pointer in place of the weights", "`teacher_model=", "can't be loaded")
def _(place):
    path = place.copy_of_teacher() / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    place.trainer(teacher=str(path.parent))


@refused("teacher", "a broken `tokenizer.json`", "No tokenizer found for `teacher_model`", "line 1")
def _(place):
    path = place.copy_of_teacher() / "tokenizer.json"
    path.write_text("{broken")
    place.trainer(teacher=str(path.parent))


@refused("teacher", "no tokenizer", "No tokenizer found for `teacher_model`", "beside its weights")
def _(place):
    folder = place.copy_of_teacher()
    for path in folder.glob("*token*"):
        path.unlink()
    place.trainer(teacher=str(folder))


@refused("teacher", "a corrupt adapter", "`teacher_model=", "can't be loaded")
def _(place):
    folder = place.folder / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    place.trainer(teacher=str(folder))


@refused("teacher", "an adapter of a base that has moved", "can't be loaded", "`base_model_name_or_path`")
def _(place):
    adapter = place.make_adapter()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/such/base"}))
    place.trainer(teacher=str(adapter))


@refused("teacher", "an adapter without some of its weights", "can't be loaded", "missing adapter keys", "lora_A")
def _(place):
    place.trainer(teacher=str(place.make_adapter(damaged=True)))


@refused("teacher", "the same of a base that another one shares", "'b'", "weights are missing", "lora_A")
def _(place):
    teachers = {"a": str(place.make_adapter("a")), "b": str(place.make_adapter("b", damaged=True))}
    dataset = tiny.make_dataset()
    place.trainer(teacher=teachers, dataset=dataset.add_column("teacher_id", ["a", "b"] * (len(dataset) // 2)))


@refused("teacher", "an adapter with added tokens", "don't fit its base", "save the whole model")
def _(place):
    base = AutoModelForCausalLM.from_pretrained(place.teacher)
    base.resize_token_embeddings(44)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(base, config).save_pretrained(place.folder / "adapter")
    place.trainer(teacher=str(place.folder / "adapter"))


@refused("teacher", "prefix tuning", "PREFIX_TUNING", "only adapters of weights teach")
def _(place):
    place.trainer(
        teacher=str(place.make_adapter(config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
    )


@refused("dataset", "texts longer than dynamic NTK has a number for", "64 positions", '"rope_type": "yarn"')
def _(place):
    folder = place.copy_of_teacher(positions=64)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    place.trainer(teacher=str(folder), max_completion_length=62)


OTHER = "another tokenizer"


@refused("teacher", f"{OTHER}, a slow one", "The teacher's tokenizer", "as a fast one", "shares the student's")
def _(place):
    place.trainer(teacher=tiny.save_model(place.folder / "slow", 0, ByT5Tokenizer(), vocab_size=400))


@refused("teacher", f"{OTHER} without a chat template, for messages", "chat template can't render", "prompts of text")
def _(place):
    student = tiny.save_model(place.folder / "chat", 0, tiny.make_chat_tokenizer(), vocab_size=262)
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "2+2?"}]}] * 8)
    place.trainer(student=student, dataset=dataset)


@refused("teacher", f"{OTHER} that doesn't give back the text of prompts", "no score for 100%", "keeps the text")
def _(place):
    student = tiny.save_model(place.folder / "bytes", 0, tiny.make_chat_tokenizer(), vocab_size=262)
    place.trainer(student=student, dataset=Dataset.from_list([{"prompt": "Two and two?"}] * 8))


@refused("teacher", f"{OTHER}, and a `rollout_func`", "what a `rollout_func`", "shares the student's tokenizer")
def _(place):
    folder = tiny.save_model(place.folder / "other", 0, tiny.make_tokenizer(tiny.WORDS[::-1]))
    place.trainer(teacher=folder, trainer_kwargs={"rollout_func": lambda prompts, trainer: {}})


@refused("teacher", "a vocabulary smaller than the student's tokenizer", "goes up to token id 31", "has only 20 rows")
def _(place):
    place.trainer(teacher=tiny.save_model(place.folder / "small", 0, vocab_size=20))


# The examples
FOLDER_OF_CHECKPOINTS = "an output folder with checkpoints"


@refused("`rlad_grpo.py`", "`--task_kwargs '{broken'`", "`--task_kwargs` must be JSON")
def _(place):
    place.run(train, "--task", "mini", "--task_kwargs", "{broken")


@refused("`rlad_grpo.py`", "`--task_kwargs 3`", "`--task_kwargs`", "settings with names")
def _(place):
    place.run(train, "--task_kwargs", "3")


for kwargs in ({"n_people": [5]}, {"n_people": [1]}, {"n_people": []}, {"n_people": 3}, {"npeople": [2]}):
    text = json.dumps(kwargs)

    refused("`rlad_grpo.py`", f"`--task_kwargs '{text}'` of the mini task", "`--task_kwargs`", "some of 2, 3 and 4")(
        lambda place, text=text: place.run(train, "--task", "mini", "--task_kwargs", text)
    )


for arguments in ("--train_size -5", "--eval_size 0", "--report_steps 0", "--teacher_samples -1"):
    refused("`rlad_grpo.py`", f"`{arguments}`", f"`{arguments.split()[0]}` must be at least")(
        lambda place, arguments=arguments: place.run(train, *arguments.split())
    )


@refused("`rlad_grpo.py`", "`--alfa 0.5`", "There is no --alfa", "Did you mean `--alpha`?")
def _(place):
    place.run(train, "--alfa", 0.5)


@refused("`rlad_grpo.py`", "`alfa: 0.5` in the file of `--config`", "There is no --alfa", "Did you mean `--alpha`?")
def _(place):
    path = place.folder / "config.yaml"
    path.write_text("alfa: 0.5")
    place.run(train, "--config", path)


@refused("`rlad_grpo.py`", "`--reward_weights 1 2`", "`--reward_weights`")
def _(place):
    place.run(train, "--reward_weights", 1, 2)


@refused("`rlad_grpo.py`", "a task without a student", "`--model_name_or_path`")
def _(place):
    place.run(train, "--task", "chain_sum")


@refused(
    "`rlad_grpo.py`", "`--teacher_samples 4` of a teacher behind a URL alone", "`--teacher_model_name_or_path` too"
)
def _(place):
    arguments = "--task chain_sum --teacher_samples 4 --teacher_server_urls http://localhost:1".split()
    place.run(train, *arguments, "--model_name_or_path", place.student)


@refused("`rlad_grpo.py`", "`--task chainsum`", "chain_sum")
def _(place):
    place.run(train, "--task", "chainsum", "--model_name_or_path", place.student)


@refused(
    "`rlad_grpo.py`", "`--resume_from_checkpoint` of a folder that isn't there", "there is no checkpoint in /no/such"
)
def _(place):
    place.run(train, "--resume_from_checkpoint", "/no/such")


@refused("`rlad_grpo.py`", "`--resume_from_checkpoint true` without checkpoints", "there is no checkpoint in")
def _(place):
    place.run(train, "--resume_from_checkpoint", "true")


@refused("`rlad_grpo.py`", FOLDER_OF_CHECKPOINTS, "`--resume_from_checkpoint true`", "another folder")
def _(place):
    place.make_checkpoint()
    place.run(train)


@refused("`offline_distillation.py`", FOLDER_OF_CHECKPOINTS, "`--resume_from_checkpoint true`", "another folder")
def _(place):
    place.make_checkpoint()
    place.run(distil)


for arguments in ("--num_prompts 0", "--eval_size 0", "--samples_per_prompt 0"):
    refused("`offline_distillation.py`", f"`{arguments}`", f"`{arguments.split()[0]}` must be at least 1")(
        lambda place, arguments=arguments: place.run(distil, *arguments.split())
    )


@refused(
    "`offline_distillation.py`", "an output folder that can't be written to", "`output_dir=", "can't be written to"
)
def _(place):
    place.run(distil, "--output_dir", "/proc/self")


@refused("`offline_distillation.py`", "a student that isn't there", "/no/such/student")
def _(place):
    place.monkeypatch.setattr(distil, "collect", None)  # before the teacher samples
    place.run(distil, "--task", "mini", "--model_name_or_path", "/no/such/student")


@refused(
    "`offline_distillation.py`",
    "samples of other settings in the output folder",
    "was asked otherwise",
    "`--output_dir`",
)
def _(place):
    place.monkeypatch.setattr(distil, "collect", None)
    path = place.folder / "out" / "teacher_samples.json"
    path.parent.mkdir()
    path.write_text('{"settings": {"num_prompts": 7}, "counts": {}}')
    place.run(distil, "--eval_size", 1)


@refused("`evaluate.py`", "`--num_samples 2 --k 3`", "from 1 to `num_samples` = 2")
def _(place):
    place.run(evaluate, "--num_samples", 2, "--k", 3)


@refused("`evaluate.py`", "`--eval_size 0`", "`--eval_size` must be at least 1")
def _(place):
    place.run(evaluate, "--eval_size", 0)


@refused("`evaluate.py`", "`--top_p 2`", "`--top_p` must be above 0 and at most 1")
def _(place):
    place.run(evaluate, "--top_p", 2)


@refused("`evaluate.py`", "`--top_p 0`", "`--top_p` must be above 0 and at most 1")
def _(place):
    place.run(evaluate, "--top_p", 0)


@refused("`evaluate.py`", "`--temperature 0`", "`--temperature` must be a positive number")
def _(place):
    place.run(evaluate, "--temperature", 0)


@refused("`evaluate.py`", "`--backend hf`", "`--backend` must be 'transformers' or 'vllm'")
def _(place):
    place.run(evaluate, "--backend", "hf")


@refused("`evaluate.py`", "an `--output` that can't be written", "can't be written to")
def _(place):
    place.run(evaluate, "--output", "/proc/self/scores.json")


def render():
    rows = [f"| {c.where} | {c.what} | {' ... '.join(c.names)} |" for c in CASES]
    return HEAD + "\n".join(rows).replace("{", "&#123;") + "\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.where}: {case.what}".replace("`", ""))
def test_bad_input_is_refused(case, tmp_path, student_path, teacher_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or the client would try for a minute

    def train(*args, **kwargs):
        raise AssertionError("it trains")

    monkeypatch.setattr("transformers.Trainer.train", train)
    with pytest.raises((OSError, RuntimeError, TypeError, ValueError)) as caught:
        case.cause(Place(tmp_path, student_path, teacher_path, monkeypatch))
    message = str(caught.value)
    assert all(name in message for name in case.names), message
    assert "hf_..." not in message


def test_the_table_in_the_docs():
    assert len(CASES) >= 60
    assert DOCS.read_text() == render()


if __name__ == "__main__":
    DOCS.write_text(render())
    print(f"Wrote {len(CASES)} rows to {DOCS.relative_to(ROOT)}")
