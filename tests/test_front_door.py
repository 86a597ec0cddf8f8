"""`trl-rlad train`: TRL's `grpo` script with a teacher, from the command line to the student that is saved."""

import ast
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import trl
import yaml
from trl import DatasetMixtureConfig
from trl.scripts import grpo

from trl_rlad import RLADTrainer, __version__
from trl_rlad.cli import COMMANDS, HELP
from trl_rlad.cli import main as cli
from trl_rlad.commands import train as command
from trl_rlad.reports import probe_run
from trl_rlad.scripts import distil, evaluate, train
from trl_rlad.scripts.arguments import parse_teachers, read_method
from trl_rlad.scripts.source import REWARD_FUNCS, judge, load_reward_funcs, load_source


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = "--use_cpu --bf16 false --max_steps 2 --per_device_train_batch_size 4 --num_generations 4 --logging_steps 1"
SMALL = f"{SMALL} --max_completion_length 8 --report_to none --save_strategy no --learning_rate 1e-3".split()


class Place:
    """A folder with a student, a teacher and problems, in which commands are given."""

    def __init__(self, folder):
        tokenizer = tiny.make_chat_tokenizer(CHAT_TEMPLATE)
        for seed, name in enumerate(("student", "teacher")):
            tiny.save_model(folder / name, seed, tokenizer=tokenizer, vocab_size=len(tokenizer))
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
                "solution": f"\\boxed{{{2 * i}}}",
                "teacher_id": ["near", "far"][i % 2],
                "difficulty": i / 2,
            }
            for i in range(8)
        ]
        (folder / "problems").mkdir()
        for split in ("train", "test"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "problems" / f"{split}.jsonl").write_text(text)
        (folder / "my_rewards.py").write_text(
            "def varied(completions, **kwargs):\n    return [float(i % 2) for i in range(len(completions))]\n"
        )
        self.folder = folder
        self.models = f"--model_name_or_path {folder}/student --teacher_model_name_or_path {folder}/teacher".split()
        self.data = f"--dataset_name {folder}/problems --reward_funcs accuracy_reward my_rewards.varied".split()

    def arguments(self, *more):
        return [*self.models, *self.data, *SMALL, "--output_dir", str(self.folder / "out"), *map(str, more)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def place(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(shared.folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    shared.out = tmp_path / "out"
    return shared


# Help


def test_neither_help_nor_the_view_imports_what_takes_seconds(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "reward": 0.5}]}')
    code = """if True:
        import sys
        from trl_rlad.cli import COMMANDS, main
        main(["--help"])
        main(["--version"])
        for command in COMMANDS:
            try:
                main([command, "--help"])
            except SystemExit as end:
                assert end.code == 0
        main(["view", sys.argv[1]])
        print(*{"torch", "transformers", "trl", "matplotlib"} & sys.modules.keys())
    """
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
    command = [sys.executable, "-c", code, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(COMMANDS) <= set(re.findall(r"^  (\w+) ", output, re.MULTILINE))
    assert f"\ntrl-rlad {__version__}\n" in output
    assert set(COMMANDS) <= set(re.findall("usage: trl-rlad ([a-z]+) ", output))
    assert output.splitlines()[-1] == "" and (tmp_path / "view.html").exists()


@pytest.mark.skipif(not trl.__version__.startswith("1.16"), reason="the help texts of TRL's flags are those of 1.16")
@pytest.mark.parametrize("script", [train, distil, evaluate], ids=lambda script: script.__name__.split(".")[-1])
def test_the_help_that_is_stored_is_the_parsers(script):
    name = script.__name__.rpartition(".")[2]
    make = f"python -c 'from {script.__name__} import *; print(make_parser().format_help(), end=\"\")'"
    help_now = script.make_parser().format_help()
    assert (HELP / f"{name}.txt").read_text().split() == help_now.split(), f"{make} > trl_rlad/scripts/help/{name}.txt"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli([command, "--help"])
    shown = {
        "view": ["(default: 2000000)"],
        "probe": ["(default: 32)"],
        "compare": ["(default: auto)"],
        "train": ["(default: 0.5)", "(default: 16,384 on a GPU and 1,024 on a CPU)"],
        "distil": ["(default: 1200)", "(default: that of a task in miniature)"],
        "evaluate": ["(default: 0.95)", "(default: 1 and `num_samples`)"],
    }
    text = " ".join(capsys.readouterr().out.split())
    assert [default for default in shown.get(command, []) if default not in text] == []


def test_help_has_what_matters_first_and_the_rest_on_request(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli(["train", "--help"])
    short = capsys.readouterr().out
    with pytest.raises(SystemExit, match="^0$"):
        cli(["train", "--help-all"])
    whole = capsys.readouterr().out
    titles = "what is trained on:", "the teacher:", "TRL's, often set:", "--help-all"
    assert sorted(titles, key=short.index) == list(titles)
    assert short.index("--teacher_log_ratio_clip") < short.index("--learning_rate")
    assert "(default: 1e-06)" in short and "--teacher-kl-coef" not in short
    assert "--adam_beta1" in whole and "--adam_beta1" not in short and len(short) < len(whole) / 4


# Launching


@pytest.mark.parametrize(
    ("line", "of_launcher", "of_script"),
    [
        ("--alpha 0.5 --max_steps 2", "", "--alpha 0.5 --max_steps 2"),
        ("--num_generations 2 --num_processes 2", "--num_processes 2", "--num_generations 2"),
        (
            "--num_processes=2 --alpha 1.0 --mixed_precision no",
            "--num_processes=2 --mixed_precision no",
            "--alpha 1.0",
        ),
        ("--config {file} --alpha 1.0", "--num_processes 3", "--config {file} --alpha 1.0"),
    ],
)
def test_what_the_script_does_not_know_is_the_launchers(line, of_launcher, of_script, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 3\nnum_processes: 3\nenv: {A: b}\n")
    found = command.split(train.make_parser(), line.format(file=file).split())
    assert found == (of_launcher.split(), of_script.format(file=file).split())


@pytest.mark.parametrize("name", ["zero3", "fsdp1", "{file}"])
def test_a_configuration_of_accelerate_by_its_name(name, tmp_path):
    (tmp_path / "own.yaml").write_text("num_processes: 1\n")
    name = name.format(file=tmp_path / "own.yaml")
    (flag, path), _ = command.split(train.make_parser(), ["--accelerate_config", name])
    assert flag == "--config_file" and yaml.safe_load(open(path))
    assert ("trl_rlad" in path, "/trl/" in path) == {"zero3": (True, False), "fsdp1": (False, True)}.get(
        name, (False, False)
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--teacher_kl_coeff 1.0", "there is no --teacher_kl_coeff. Did you mean `--teacher_kl_coef`?"),
        ("--num_processes 2", "2 processes without GPUs need a configuration: --accelerate_config zero3"),
        ("--accelerate_config zero4", "Refused: `--accelerate_config zero4` is neither a file nor one of cpu, fsdp2"),
        ("--alpha 2", "Refused: `alpha` must be in [0, 1]"),
        ("--method tdrl", "Refused: `--method tdrl` is none of credit, "),
        ("--task mini --dataset_name x", "Refused: `--task mini` has prompts and a reward of its own"),
        ("--dataset_name x", "Refused: A dataset needs a student: name it with `--model_name_or_path`"),
        ("--dataset_name x --model_name_or_path y", "Refused: A dataset needs rewards: name `--reward_funcs`"),
        ("--dataset_name x --model_name_or_path y --reward_funcs z", "`--reward_funcs z` is none of accuracy_reward"),
        ("--dataset_name x --model_name_or_path y --reward_funcs z.w", "`--reward_funcs z.w`: No module named 'z'"),
    ],
)
def test_what_is_refused_is_one_line_and_exits_with_2(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    with pytest.raises(SystemExit, match="^2$"):
        cli(["train", *line.split(), "--bf16", "false", "--teacher_model_name_or_path", "t"])
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


# Arguments


def test_reward_functions_have_trls_names():
    (found,) = (
        node.value
        for node in ast.walk(ast.parse(inspect.getsource(grpo.main)))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "reward_funcs_registry"
    )
    assert [key.value for key in found.keys] == list(REWARD_FUNCS)
    (call,) = (value for value in found.values if isinstance(value, ast.Call))
    settings = {keyword.arg: keyword.value.value for keyword in call.keywords}
    punishment = REWARD_FUNCS["get_soft_overlong_punishment"]
    assert settings == {name: getattr(punishment, name) for name in settings}


def test_a_reward_model_comes_before_the_functions(place):
    model, function, own = load_reward_funcs("some/model", ["accuracy_reward", "my_rewards.varied"])
    assert (model, function, own.__name__) == ("some/model", REWARD_FUNCS["accuracy_reward"], "varied")


def test_a_dataset_without_rewards_is_enough_for_pure_distillation(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "w1"}\n')
    script_args = train.ScriptArguments(dataset_name=str(tmp_path / "train.jsonl"))
    args = tiny.make_config(tmp_path, distillation_fraction=1.0)
    source = load_source(script_args, args, DatasetMixtureConfig(), None)
    assert source.train_dataset["prompt"] == ["w1"] and source.reward_funcs == [] and source.task is None
    args.distillation_fraction = 0.9
    with pytest.raises(ValueError, match="needs rewards: .* Only `--distillation_fraction 1.0` needs none"):
        load_source(script_args, args, DatasetMixtureConfig(), None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", None),
        ("--teacher_model_name_or_path a", "a"),
        ("--teacher_model_name_or_path a --teacher_model_name_or_path b", {"a": "a", "b": "b"}),
        ("--teacher_model_name_or_path a b", {"a": "a", "b": "b"}),
        ("""--teacher_model_name_or_path '{"x": "a", "y": "b"}'""", {"x": "a", "y": "b"}),
    ],
)
@pytest.mark.parametrize("in_file", [None, "c", ["c", "d"], {"x": "c"}])
def test_several_teachers(line, expected, in_file, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.dump({"teacher_model_name_or_path": in_file} if in_file else {"alpha": 0.5}))
    arguments = ["--config", str(file), "--bf16", "false", "--task", "mini", *shlex.split(line)]
    script_args = train.parse_arguments(train.make_parser(), train.MINI / "config.yaml", arguments)[0]
    assert script_args.teacher == (expected or parse_teachers(in_file))


@pytest.mark.parametrize(
    ("in_file", "line", "expected"),
    [
        ({}, "", (0.0, 0.5)),  # the main job's own
        ({}, "--method grpo", (0.0, 1.0)),
        ({}, "--method grpo --alpha 0.25", (0.0, 0.25)),
        ({"alpha": 0.75}, "--method grpo", (0.0, 1.0)),
        ({"alpha": 0.75, "method": "grpo"}, "", (0.0, 0.75)),
        ({"alpha": 0.75, "method": "grpo"}, "--method rlad-named --alpha 0.1", (1.0, 0.1)),
    ],
)
def test_a_method_gives_way_to_what_is_said_closer_to_the_command(in_file, line, expected, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.dump(in_file | {"max_steps": 3}))
    arguments = ["--config", str(file), *line.split()]
    _, args, *_ = train.parse_arguments(train.make_parser(), train.MINI / "config.yaml", arguments)
    assert ((args.teacher_kl_coef, args.alpha), args.max_steps) == (expected, 3)


# As in TRL's documentation, written anew. Those after `--config` are of the file
GRPO_COMMANDS = [
    "--model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name DATA --reward_funcs accuracy_reward",
    "--model_name_or_path MODEL --dataset_name DATA --reward_funcs accuracy_reward think_format_reward "
    "--reward_weights 1.0 0.2",
    "--model_name_or_path MODEL --dataset_name DATA --reward_funcs my_rewards.varied --output_dir grpo-out "
    "--learning_rate 1e-5 --gradient_accumulation_steps 2 --gradient_checkpointing --dtype float32 "
    "--max_completion_length 128 --log_completions",
    "--model_name_or_path MODEL --dataset_name DATA --reward_funcs reasoning_accuracy_reward "
    "get_soft_overlong_punishment --loss_type dapo --epsilon_high 0.28 --beta 0.0 --mask_truncated_completions",
    "--model_name_or_path MODEL --dataset_name DATA --reward_model_name_or_path REWARD",
    "--model_name_or_path MODEL --dataset_name DATA --reward_funcs accuracy_reward --use_peft --lora_r 8 "
    "--lora_alpha 16 --lora_target_modules q_proj v_proj --learning_rate 1e-4",
    "--model_name_or_path MODEL --dataset_name DATA --dataset_config default --dataset_train_split train "
    "--dataset_test_split test --eval_strategy steps --eval_steps 1 --reward_funcs accuracy_reward "
    "--per_device_eval_batch_size 8",
    "--model_name_or_path MODEL --dataset_name DATA --dataset_streaming --reward_funcs accuracy_reward "
    "--dataloader_num_workers 0",
    "--model_name_or_path MODEL --dataset_name DATA --reward_funcs accuracy_reward --attn_implementation sdpa "
    "--model_revision main --push_to_hub --hub_model_id me/mine --num_generations 2 --temperature 0.7 --top_p 0.9",
    "--config model_name_or_path: MODEL\ndataset_name: DATA\nreward_funcs: [accuracy_reward]\nlearning_rate: 1.0e-5\n"
    "num_processes: 4\nenv: {SOME_SETTING: x}\n",
    "--config model_name_or_path: MODEL\nreward_funcs: [accuracy_reward, my_rewards.varied]\ndatasets:\n"
    "  - {path: json, data_files: DATA/train.jsonl, fraction: 0.5}\n"
    "  - {path: json, data_files: DATA/test.jsonl, columns: [prompt, solution, teacher_id, difficulty], "
    "fraction: 0.5}\n"
    "test_split_size: 0.25\neval_strategy: epoch\nper_device_eval_batch_size: 8\n",
    "--accelerate_config zero3 --num_processes 2 --model_name_or_path MODEL --dataset_name DATA "
    "--reward_funcs accuracy_reward",
]


@pytest.mark.parametrize("line", GRPO_COMMANDS)
def test_commands_of_trl_grpo_with_a_teacher(line, place, tmp_path, monkeypatch):
    names = {"Qwen/Qwen2.5-0.5B-Instruct": "student", "MODEL": "student", "DATA": "problems", "REWARD": "reward"}
    if "REWARD" in line:
        tiny_reward_model(place.folder / "reward")
    for name, path in names.items():
        line = line.replace(name, str(place.folder / path))
    if line.startswith("--config "):
        file = tmp_path / "grpo.yaml"
        file.write_text(line.removeprefix("--config "))
        arguments = ["--config", str(file)]
    else:
        arguments = line.split()
    # As TRL's own script parses it
    *_, of_trl = grpo.make_parser().parse_args_and_config(
        [*arguments, "--bf16", "false"], return_remaining_strings=True
    )
    monkeypatch.delenv("SOME_SETTING", raising=False)
    monkeypatch.setattr(RLADTrainer, "init_hf_repo", lambda *args, **kwargs: None)
    small = {"--output_dir": tmp_path / "out", "--max_completion_length": 8, "--bf16": "false", "--report_to": "none"}
    small |= {"--max_steps": 1, "--teacher_model_name_or_path": place.folder / "teacher"}
    arguments += [str(word) for flag in small.items() for word in flag] + ["--use_cpu"]
    of_launcher, of_script = command.split(train.make_parser(), arguments)
    assert [word for word in of_launcher if word.startswith("--num")] == [w for w in of_trl if w.startswith("--num")]
    trainer, source, *_ = train.prepare(of_script, is_launched=True)
    assert trainer.teacher_scorer.teachers[""].name == "teacher"
    assert (source.eval_dataset is not None) == ("eval_strategy" in line)
    for name in ("learning_rate", "beta", "temperature", "loss_type", "epsilon_high", "num_generations"):
        if written := re.search(rf"--{name} (\S+)", line):
            value = getattr(trainer.args, name)
            assert value == type(value)(written[1]), name
    assert ("--use_peft" in line) == hasattr(trainer.model, "peft_config")


def tiny_reward_model(path):
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    tokenizer = tiny.make_chat_tokenizer(CHAT_TEMPLATE)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer), "pad_token_id": 0}
    Qwen3ForSequenceClassification(Qwen3Config(**sizes, num_labels=1)).save_pretrained(path)
    tokenizer.save_pretrained(path)


# Runs


def test_a_run_on_a_dataset(place, capsys):
    evaluation = "--eval_strategy steps --eval_steps 2 --per_device_eval_batch_size 4 --num_generations_eval 2".split()
    out = str(place.out)
    trainer, source, script_args, checkpoint = train.prepare(place.arguments(*evaluation, "--output_dir", out))
    train.run(trainer, source, script_args, checkpoint)
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if re.match("(device|student|teacher|method|data) ", line)]
    assert len(lines) == 5 and "teacher, whole on each process, 1,024 tokens at once" in lines[2]
    assert lines[3].startswith("method   rlad (alpha=0.5)")
    assert lines[4].endswith("8 prompts with 4 completions each; rewards: accuracy_reward, varied")
    assert re.search(r"^ +varied  mean@2   0\.500 ->  0\.500$", output, re.MULTILINE)
    assert re.search(r"^ +varied  pass@2   1\.000 ->  1\.000$", output, re.MULTILINE)
    assert "Mean reward of the rollouts: 0.50 -> 0.50" in output and f"Saved to {out}" in output
    assert {"model.safetensors", "README.md", "trainer_state.json", "reward.png"} <= {
        path.name for path in place.out.iterdir()
    }
    assert "problems" in (place.out / "README.md").read_text()


def test_two_teachers_each_have_their_rows(place):
    teachers = json.dumps({"near": f"{place.folder}/student", "far": f"{place.folder}/teacher"})
    arguments = place.arguments("--output_dir", place.out, "--max_steps", 2, "--per_device_train_batch_size", 8)
    arguments[3] = teachers  # after `--teacher_model_name_or_path`
    trainer, source, *rest = train.prepare(arguments)
    assert trainer.teacher_scorer.teachers.keys() == {"near", "far"}
    assert "near: student, whole on each process" in train.describe(trainer, source)
    train.run(trainer, source, *rest)
    assert {"teacher/near/log_ratio", "teacher/far/log_ratio"} <= {k for log in trainer.state.log_history for k in log}


def test_the_teacher_is_believed_where_it_is_right(place, monkeypatch):
    answers = []

    def sample(teacher, prompts, num_samples, **sampling):
        answers.append((teacher, num_samples, sampling["max_new_tokens"]))
        return [[f"\\boxed{{{2 * i}}}", "\\boxed{100}"] for i in range(len(prompts))]

    monkeypatch.setattr("trl_rlad.scripts.sampling.sample", sample)
    arguments = place.arguments("--output_dir", place.out, "--teacher_samples", 2)
    arguments.remove("my_rewards.varied")
    trainer, *_ = train.prepare(arguments)
    assert answers == [(f"{place.folder}/teacher", 2, 8)]
    assert trainer.train_dataset["teacher_weight"][:] == [0.5] * 8


def test_success_is_judged_by_the_weighted_sum_of_the_rewards(place):
    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    def unsure(completions, **kwargs):
        return [None if text == "x" else 1.0 for text in completions]

    reward = judge([length, unsure], [1.0, 2.0], 3.0, f"{place.folder}/student")
    # One byte is a token: 1 + 0, 1 + 2, 2 + 2
    assert reward(completions=["x", "y", "yz"]) == [0.0, 0.0, 1.0]
    assert judge([unsure], None, 0.0, f"{place.folder}/student")(completions=["x", "y"]) == [None, 1.0]


def test_an_interrupted_run_says_how_to_go_on_and_does(place, capsys, monkeypatch):
    arguments = place.arguments(
        "--output_dir", place.out, "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2
    )
    step = RLADTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RLADTrainer, "training_step", interrupt)
        with pytest.raises(SystemExit, match="^130$"):
            cli(["train", *arguments])
    said = capsys.readouterr().out
    assert f"The same command goes on from {place.out}/checkpoint-2 with `--resume_from_checkpoint true`." in said
    assert not (place.out / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="^0$"):
        cli(["train", *arguments, "--resume_from_checkpoint", "true"])
    assert (place.out / "model.safetensors").exists()
    history = json.loads((place.out / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "loss" in log] == [1, 2, 3, 4]


def test_what_an_interrupted_run_without_checkpoints_says(tmp_path):
    assert "Nothing was saved" in train.how_to_go_on(str(tmp_path))


@pytest.mark.parametrize("name", ["rlad-named", "rlad_named"])
def test_a_method_is_found_by_either_spelling(name):
    assert read_method(name)["teacher_kl_on"] == "failed"


def test_the_probe_runs_the_command_itself(place, tmp_path, monkeypatch, capsys):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(probe_run, "_leave", leave)
    # The folder is that of a run with a checkpoint, from which the command would go on
    state = Path(place.out, "checkpoint-7", "trainer_state.json")
    state.parent.mkdir(parents=True)
    state.write_text("of another run")
    output = tmp_path / "probe.json"
    arguments = place.arguments(
        "--output_dir", place.out, "--resume_from_checkpoint", "true", "--teacher_samples", "1"
    )
    with pytest.raises(SystemExit, match="0"):
        cli(["probe", "--prompts", "2", "--output", str(output), "train", *arguments])
    printed = capsys.readouterr().out.rstrip().split("\n")
    assert printed[2] == f"Paste:      {json.loads(output.read_text())['advice']['paste']}"
    assert f"trl-rlad train {shlex.join(map(str, arguments))}" in printed[2]
    assert printed[-3:] == [printed[0], printed[2], printed[-1]]  # a screen shows the end, and what to do is there too
    assert list(Path(place.out).rglob("*")) == [state.parent, state] and state.read_text() == "of another run"
