"""Uploads with the real `huggingface_hub` client, to a server on loopback that stands in for the Hub."""

import os
import pickle
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml
from accelerate import Accelerator
from hub_server import HubServer
from huggingface_hub import ModelCard
from matplotlib.axes import Axes
from teacher_server import TeacherServer

from trl_rlad import RLADTrainer
from trl_rlad._trl import names
from trl_rlad.model_card import draw, launch_command, tabulate


TESTS = Path(__file__).parent
# The client reads its environment when it is imported, so all of this is one process of its own, which pickles what
# came of each stage and what is on the Hub thereafter
STORY = """
import os, pickle, sys, traceback
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

tests, student, teacher, folder = sys.argv[1:]
sys.path.insert(0, tests)
from hub_server import HubServer

hub = HubServer().__enter__()
environment = hub.env(Path(folder) / "home")
os.environ.clear()
os.environ.update(environment)

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rlad import RLADTrainer

output_dir, data, stages = Path(folder) / "out", tiny.make_dataset(), {}


def stage(function):
    requests, error = len(hub.requests), ""
    with redirect_stdout(StringIO()) as stdout:
        try:
            function()
        except Exception:
            error = traceback.format_exc()
    files = {str(path.relative_to(output_dir)): path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    stages[function.__name__] = {
        "error": error,
        "stdout": stdout.getvalue(),
        "files": files,
        "repos": {name: dict(repo) for name, repo in hub.repos.items()},
        "requests": hub.requests[requests:],
    }


def train(token):
    config = tiny.make_config(
        output_dir,
        max_steps=2,
        teacher_kl_coef=0.5,
        teacher_kl_coef_final=0.1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        push_to_hub=True,
        hub_model_id="tester/pupil",
        hub_token=token,
        hub_strategy="end",
        save_strategy="steps",
        save_steps=1,
    )
    global trainer
    trainer = RLADTrainer(student, tiny.reward, config, data, data.select(range(4)), teacher_model=teacher)
    trainer.train()


@stage
def refused_at_the_start():
    train("hf_bad")


@stage
def refused_at_the_end():
    train(hub.token)
    hub.token = "revoked"
    trainer.push_to_hub(dataset_name="puzzles/knights")


@stage
def pushed():
    hub.token = trainer.args.hub_token
    trainer.push_to_hub(dataset_name="puzzles/knights")


@stage
def loaded():
    model, tokenizer = (auto.from_pretrained("tester/pupil") for auto in (AutoModelForCausalLM, AutoTokenizer))
    local = AutoModelForCausalLM.from_pretrained(output_dir)
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in model.state_dict().items())
    assert tokenizer("w0 w1").input_ids == [4, 5], tokenizer("w0 w1").input_ids


Path(folder, "stages").write_bytes(pickle.dumps(stages))
"""
TOKEN = "hf_good"
ARRIVED = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def stages(tmp_path_factory, student_path, teacher_path):
    """A token that is refused before training and one that is after it, a push, and a download."""
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, "-c", STORY, str(TESTS), student_path, teacher_path, str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    stages = pickle.loads((folder / "stages").read_bytes())
    return SimpleNamespace(**stages, log=run.stdout + run.stderr, folder=folder)


def test_card_weights_and_tokenizer_arrive(stages, teacher_path):
    assert not stages.pushed["error"]
    there = stages.pushed["repos"]["tester/pupil"]
    assert ARRIVED <= there.keys()

    card = there["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"trl", "grpo", "rlad"} <= set(metadata["tags"]) and metadata["datasets"] == "puzzles/knights"
    assert "None" not in card.split("trl-rlad ")[-1].split("\n")[0]  # only what is installed
    for expected in (
        "trained with RLAD, a method introduced in [Reinforcement-aware Knowledge Distillation for LLM Reasoning]",
        "@article{zhang2026rlad",
        "@software{vonwerra2020trl",
        f"| Teacher | {Path(teacher_path).name} |",
        "| Dataset | puzzles/knights |",
        "| `alpha` | 0.5 |",
        "| `teacher_log_ratio_clip` | 1.0 |",
        "| `teacher_kl_coef` | 0.5 to 0.1 |",
        "| Steps | 2 |",
        "|  | step | reward/mean | reward/pass@1 | reward/pass@4 |",
        "\n|  | 1 | ",
        "\n|  | 2 | ",
        'pipeline("text-generation", model="tester/pupil"',
        "![The reward and the teacher over the steps of training](training.png)",
        f"trl-rlad {version('trl-rlad')}, trl {version('trl')}",
    ):
        assert expected in card, expected
    assert there["training.png"].startswith(b"\x89PNG")
    assert str(stages.folder) not in card and teacher_path not in card, "a local path has left the machine"


def test_the_token_is_nowhere(stages):
    # Not in the folder, its checkpoint or the pickled arguments, nor on the Hub, nor in the log
    said = [stages.log]
    said += [stage[name] for name in ("stdout", "error") for stage in (stages.refused_at_the_end, stages.pushed)]
    assert "checkpoint-1/training_args.bin" in stages.pushed["files"]
    written = [*stages.pushed["files"].values(), *stages.pushed["repos"]["tester/pupil"].values()]
    assert not any(TOKEN.encode() in data for data in [*written, *(text.encode() for text in said)])


def test_rollouts_stay_at_home(stages):
    assert any(name.startswith("_rollouts/") for name in stages.pushed["files"])
    assert not any("rollouts" in name for name in stages.pushed["repos"]["tester/pupil"])


def test_what_was_pushed_is_loaded_again(stages):
    assert not stages.loaded["error"]
    fetched = [request for request in stages.loaded["requests"] if request.startswith("GET /tester/pupil/resolve/")]
    assert any(request.endswith("/model.safetensors") for request in fetched)  # and not from the disk


def test_a_token_refused_at_the_start_costs_no_training(stages):
    refused = stages.refused_at_the_start
    assert "401" in refused["error"] and "'loss'" not in refused["stdout"] and not refused["repos"]


def test_a_token_refused_at_the_end_loses_nothing(stages):
    refused = stages.refused_at_the_end
    assert "401" in refused["error"] and "'loss'" in refused["stdout"]
    assert ARRIVED <= refused["files"].keys() and "model.safetensors" not in refused["repos"]["tester/pupil"]


def test_a_finished_folder_is_pushed_alone_and_an_upload_that_is_killed_loses_nothing(hub, tmp_path, make_trainer):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    folder = Path(trainer.args.output_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    # As docs/hub.md says it
    command = [
        Path(sys.executable).with_name("hf"),
        "upload",
        "tester/pupil",
        folder,
        ".",
        "--exclude",
        "checkpoint-*/*",
    ]
    env = hub.env(tmp_path / "home") | {"HF_TOKEN": hub.token}
    is_sending, store = threading.Event(), hub.lfs_put
    hub.lfs_put = lambda *args: is_sending.set() or {}  # takes the weights, and keeps nothing
    upload = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert is_sending.wait(60)
    upload.kill()
    upload.wait()
    assert "model.safetensors" not in hub.repos["tester/pupil"]
    assert {path: path.read_bytes() for path in before} == before

    hub.lfs_put = store
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    there = hub.repos["tester/pupil"]
    assert there["model.safetensors"] == before[folder / "model.safetensors"]
    assert {"README.md", "config.json", "tokenizer.json"} <= there.keys()
    assert not any(name.startswith("checkpoint-") for name in there)
    assert {path: path.read_bytes() for path in before} == before


def test_the_launch_command_keeps_secrets_and_folders_to_itself():
    arguments = ["/home/me/run.py", "--hub_token", "abc", "--hub_token=def", "--name", "hf_abcdefgh", "--x", "s3cret"]
    arguments += ["--output_dir", "/home/me/out", "--task_kwargs", '{"dataset": "/data/mine"}', "--config", "a/b.yaml"]
    arguments += ["--teacher_tokens_per_batch", "1024", "--teacher", "https://example.org/v1/teacher"]
    arguments += ["--WANDB_API_KEY", "ghi", "--password=jkl"]
    assert launch_command(arguments, {"s3cret", None}) == (
        "run.py --hub_token *** --hub_token=*** --name *** --x *** --output_dir out "
        '--task_kwargs \'{"dataset": "mine"}\' --config a/b.yaml --teacher_tokens_per_batch 1024 '
        "--teacher https://example.org/v1/teacher --WANDB_API_KEY *** --password=***"
    )
    assert launch_command(["-c", "--x", "1"], set()) is None
    for start in (["/env/bin/trl-rlad", "train"], ["/env/lib/trl_rlad/scripts/train.py"]):
        assert launch_command([*start, "--alpha", "1"], set()) == "trl-rlad train --alpha 1"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--password", "it's my secret"], "--password ***"),  # which quotes would change
        (["--api-key=ab cd", "--wandb_api_key", "x y"], "--api-key=*** --wandb_api_key ***"),
        (["--model_init_kwargs", '{"token": "ab cd", "x": 1}'], """--model_init_kwargs '{"token": "***", "x": 1}'"""),
        (["--url", "https://me:pass@host/x"], "--url https://***@host/x"),
        (["--note", "key sk-0123456789"], "--note 'key ***'"),  # in the environment
        (["--output_dir", "/home/me/my runs/the best/out"], "--output_dir out"),
        (["--dir=/home/me/my runs/out", "--max_tokens", "5"], "--dir=out --max_tokens 5"),
        (["--task_kwargs", '{"a": "/my data/b", "c": "/d/e f/g"}'], """--task_kwargs '{"a": "b", "c": "g"}'"""),
    ],
)
def test_secrets_and_folders_with_blanks_stay_out_of_the_launch_command(arguments, shown, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    assert launch_command(["/my home/run.py", *arguments], set()) == f"run.py {shown}"


def test_nothing_breaks_out_of_its_place_in_the_card(make_trainer, monkeypatch):
    evil = "x | y\n\n# heading\n```\n<script>1</script> [a](http://b) `c`"
    monkeypatch.setattr(sys, "argv", ["train.py", "--note", f"{evil}\n````"])
    trainer = make_trainer(alpha=0.5)
    trainer.state.log_history = [{"step": 1, "eval_a|b_runtime": 1.0, "eval_rewards/c|d/mean": 0.5}]
    for teacher in trainer.run_record.record["teachers"].values():
        teacher["name"] = evil
    trainer.create_model_card(model_name=evil, dataset_name=evil)
    card = Path(trainer.args.output_dir, "README.md").read_text()
    fence = "`````"
    assert card.count(fence) == 2  # longer than any within
    command = card[card.index(f"{fence}bash\n") : card.rindex(fence)]
    rest = card.replace(command, "")[card.index("\n---\n") :]  # YAML has quoted it
    assert "# heading" in command and "# heading" not in rest and "<script>" not in rest and "](http://b)" not in rest
    rows = [line for line in rest.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows if "step" not in line.split("|")[2]} <= {3, 4}
    assert [line.count("|") for line in rows if "a&#124;b" in line or "c&#124;d" in line] == [4, 4]
    (teacher,) = [line for line in rows if line.startswith("| Teacher")]
    assert teacher.count("|") == 3 and "&#124;" in teacher
    assert ModelCard(card).data.library_name == "transformers"


def test_a_secret_that_begins_with_another_is_kept_whole():
    assert launch_command(["run.py", "--x", "abc", "--y", "abcdef"], {"abc", "abcdef"}) == "run.py --x *** --y ***"


def test_the_card_names_a_served_teacher_and_no_address(tmp_path, student_path, teacher_path, monkeypatch):
    with TeacherServer(teacher_path) as one, TeacherServer(teacher_path) as other:
        urls = [f"{one.url}/v1", other.url]
        command = ["/home/me/train.py", "--teacher_server_urls", *urls, "--alpha", "0.3"]
        monkeypatch.setattr(sys, "argv", command)
        args = tiny.make_config(tmp_path, teacher_server_urls=urls, alpha=0.3)
        RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset()).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| Teacher | {Path(teacher_path).name} |" in card and "| `alpha` | 0.3 |" in card
    assert "\ntrain.py --teacher_server_urls" in card and "--alpha 0.3\n" in card
    assert "127.0.0.1" not in card and f":{one.port}" not in card and f":{other.port}" not in card


def test_who_teaches_stands_on_the_card_with_the_revision_and_else_nobody(make_trainer, monkeypatch):
    trainer = make_trainer(alpha=1.0)
    trainer.run_record.record["teachers"] = {
        "a": {"name": "big/one", "commit": "0123456789"},
        "b": {"name": "big/two"},
    }
    trainer.args.teacher_model_revision = "v1"
    trainer.create_model_card()
    path = Path(trainer.args.output_dir, "README.md")
    one = "[big/one](https://huggingface.co/big/one/tree/0123456789) at `0123456`"
    assert f"| Teacher | {one}, big/two at v1 |" in path.read_text()
    assert "| Dataset | not named |" in path.read_text()
    trainer.run_record.record["teachers"] = {}
    trainer.train_dataset.info.dataset_name = "puzzles"
    trainer.state.global_step, trainer.state.max_steps = 3, 5
    trainer.args.hub_token = "f1rst"
    monkeypatch.setattr("trl_rlad.model_card.get_token", lambda: "s3cond")
    monkeypatch.setattr("trl_rlad.model_card.run_links", lambda: {"Trackio": "https://track.io/run"})
    monkeypatch.setattr(sys, "argv", ["train.py", "f1rst", "s3cond"])
    trainer.create_model_card(model_name="pupil", tags=["mine"])
    card = path.read_text()
    for expected in ("| Teacher | none |", "| Dataset | puzzles |", "| Steps | 3 |", "| `success_reward` | 0.0 |",
                     "\ntrain.py *** ***\n", "https://track.io/run", "pupil"):  # fmt: skip
        assert expected in card, expected
    metadata = yaml.safe_load(card.split("---")[1])
    assert "mine" in metadata["tags"] and metadata["model_name"] == "pupil"


def test_where_the_run_is_logged(monkeypatch):
    wandb = SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(names, "is_wandb_available", lambda: True)
    monkeypatch.setattr(names, "get_trackio_space_url", lambda: "https://trackio")
    monkeypatch.setattr(names, "get_comet_experiment_url", lambda: None)
    assert names.run_links() == {"Trackio": "https://trackio"}
    wandb.run = SimpleNamespace(url="https://wandb")
    monkeypatch.setattr(names, "get_comet_experiment_url", lambda: "https://comet")
    links = {"Trackio": "https://trackio", "Comet": "https://comet", "Weights & Biases": "https://wandb"}
    assert names.run_links() == links


def test_the_picture_has_a_panel_for_each_of_its_metrics_with_more_than_one_point(tmp_path, monkeypatch):
    drawn, plot = {}, Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args: drawn.update({len(drawn): args}) or plot(self, *args))
    logs = [{"step": 1, "reward": 0.1}, {"step": 3, "reward": 0.3, "teacher/kl": None}]
    assert draw(logs[:1], tmp_path / "one.png") is None and not (tmp_path / "one.png").exists()
    assert draw(logs, tmp_path / "two.png") == "two.png" and list(drawn.values()) == [((1, 3), (0.1, 0.3))]
    drawn.clear()
    values = {"reward": 0.5, "teacher/log_ratio": 0.6, "teacher/kl": 0.7}
    draw([*logs, {"step": 4, **values}, {"step": 5, **values}], tmp_path / "three.png")
    assert list(drawn.values()) == [
        ((1, 3, 4, 5), (0.1, 0.3, 0.5, 0.5)), ((4, 5), (0.6, 0.6)), ((4, 5), (0.7, 0.7))
    ]  # fmt: skip


def test_completions_in_a_step_and_processes(make_trainer, monkeypatch):
    trainer = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    # Two processes for the card alone, by a stub: a real launch of them takes half a minute
    for processes, launch, completions in ((1, "1 process", 12), (2, "2 processes", 24)):
        with monkeypatch.context() as stub:
            stub.setattr(Accelerator, "num_processes", processes)
            trainer.create_model_card()
        card = Path(trainer.args.output_dir, "README.md").read_text()
        assert f"| Completions in a step | {completions} |" in card
        assert f"\n# on {launch}\ntrain.py\n" in card


def test_an_evaluation_stands_in_the_table_once_and_of_several_the_first_and_the_last():
    def logs(dataset, *steps):
        names = f"eval_{dataset}runtime", "eval_rewards/reward/mean"
        return [{names[0]: 1.0, names[1]: 0.1 * step, "step": step} for step in steps]

    heading = ["", "step", "reward/mean"]
    assert tabulate(logs("", 2)) == [heading, ["", "2", "0.200"]]
    assert tabulate([*logs("", 2), {"eval_runtime": 1.0, "step": 4}])[-1] == ["", "4", ""]  # not judged
    assert tabulate([{"step": 1, "loss": 0.5}]) == []
    assert tabulate(logs("easy_", 1, 2, 3) + logs("hard_", 3)) == [
        heading,
        ["easy", "1", "0.100"],
        ["easy", "3", "0.300"],
        ["hard", "3", "0.300"],
    ]


def test_an_address_that_another_begins_with_leaves_no_port():
    secrets = ["http://10.0.0.1", "http://10.0.0.1:8000"]
    assert launch_command(["run.py", *secrets], secrets) == "run.py *** ***"
