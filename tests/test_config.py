import pytest
import tiny
from trl import GRPOConfig, TrlParser

from trl_rlad import RLADConfig


CPU = ["--use_cpu", "--bf16", "false", "--output_dir", "out"]


def test_defaults_are_the_papers(tmp_path):
    config = RLADConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (config.alpha, config.teacher_log_ratio_clip) == (0.5, 1.0)
    assert (config.epsilon, config.epsilon_high, config.loss_type, config.num_generations) == (0.2, 0.28, "grpo", 8)
    assert config.learning_rate == 1e-6


def test_nothing_else_differs_from_grpo():
    ours, theirs = RLADConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
    changed = {name for name in theirs if ours[name].default != theirs[name].default}
    assert changed == {"epsilon_high", "loss_type"}
    assert ours.keys() - theirs.keys() == {
        "alpha",
        "teacher_credit",
        "teacher_kl_coef",
        "teacher_kl_coef_final",
        "teacher_kl",
        "teacher_kl_on",
        "teacher_top_k",
        "distillation_fraction",
        "success_reward",
        "teacher_log_ratio_clip",
        "teacher_model_init_kwargs",
        "teacher_model_revision",
        "teacher_zero_stage",
        "teacher_offload",
        "teacher_server_urls",
        "on_teacher_failure",
        "teacher_timeout",
        "trim_padding",
        "log_rollouts",
        "teacher_tokens_per_batch",
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://a:8000/", {"": ["http://a:8000"]}),
        ("http://a:8000/v1", {"": ["http://a:8000"]}),
        ("http://a:8000/v1/", {"": ["http://a:8000"]}),
        ('["http://a", "https://b/teachers"]', {"": ["http://a", "https://b/teachers"]}),
        (
            '{"math": "http://a", "code": ["http://b", "http://c"]}',
            {"math": ["http://a"], "code": ["http://b", "http://c"]},
        ),
    ],
)
def test_servers_on_the_command_line(given, expected, tmp_path):
    (config,) = TrlParser(RLADConfig).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--teacher_server_urls", given]
    )
    assert config.teacher_servers == expected


def test_command_line(tmp_path):
    arguments = [
        "--alpha",
        "0.3",
        "--teacher_log_ratio_clip",
        "inf",
        "--teacher_model_init_kwargs",
        '{"dtype": "bfloat16"}',
    ]
    (config,) = TrlParser(RLADConfig).parse_args_and_config([*CPU, *arguments])
    assert (config.alpha, config.teacher_log_ratio_clip) == (0.3, float("inf"))
    assert config.teacher_model_init_kwargs == {"dtype": "bfloat16"}


def test_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "alpha: 0.7\nteacher_log_ratio_clip: null\nteacher_model_init_kwargs: {dtype: float32}\nbeta: 0.01\n"
    )
    (config,) = TrlParser(RLADConfig).parse_args_and_config([*CPU, "--config", str(path)])
    assert (config.alpha, config.teacher_log_ratio_clip, config.beta) == (0.7, None, 0.01)
    assert config.teacher_model_init_kwargs == {"dtype": "float32"}


def test_help_has_our_arguments(capsys):
    with pytest.raises(SystemExit):
        TrlParser(RLADConfig).parse_args_and_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--teacher_log_ratio_clip" in text and "anchor of the likelihood ratio" in text


@pytest.mark.parametrize(
    ("kwargs", "warns"),
    [
        ({"distillation_fraction": 0.4, "lr_scheduler_type": "linear"}, True),
        ({"distillation_fraction": 0.4, "lr_scheduler_type": "cosine"}, True),
        ({"distillation_fraction": 0.4, "lr_scheduler_type": "constant_with_warmup"}, False),
        ({"distillation_fraction": 1.0, "lr_scheduler_type": "linear"}, False),
        ({"lr_scheduler_type": "linear"}, False),
    ],
)
def test_a_learning_rate_that_decays_during_distillation(kwargs, warns, tmp_path, recwarn):
    tiny.make_config(tmp_path, **kwargs)
    assert warns == any("leaves little of it for the reward" in str(warning.message) for warning in recwarn)


def test_what_a_warning_is_about(tmp_path, recwarn):
    def warn(**kwargs):
        recwarn.clear()
        tiny.make_config(tmp_path, **kwargs)
        return [(str(warning.message), warning.filename) for warning in recwarn if "effect" in str(warning.message)]

    ((message, filename),) = warn(on_teacher_failure="grpo")
    assert message == "`on_teacher_failure` has no effect without `teacher_server_urls`."
    assert filename == tiny.__file__  # where the settings are made
    assert not warn(on_teacher_failure="grpo", teacher_server_urls="http://a")


def test_a_revision_may_be_named_with_the_other_arguments(tmp_path):
    args = tiny.make_config(tmp_path, teacher_model_init_kwargs={"revision": "v1"})
    assert args.teacher_model_init_kwargs == {"revision": "v1"}


def test_who_needs_a_teacher(tmp_path):
    settings = {"alpha": 0.9}, {"teacher_kl_coef": 0.1}, {"teacher_kl_coef_final": 0.1}, {"distillation_fraction": 0.1}
    assert all(tiny.make_config(tmp_path, **{"alpha": 1.0} | each).needs_teacher for each in settings)
    assert not tiny.make_config(tmp_path, alpha=1.0, teacher_kl="forward").needs_teacher
