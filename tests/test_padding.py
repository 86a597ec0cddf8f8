"""The student's passes without padding: the same step as TRL's, to rounding."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_distributed import launch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_rlad import RLADTrainer
from trl_rlad._trl import names
from trl_rlad._trl.padding import merge, select, trim


def roll_out(prompts, trainer):
    """Completions of 1 to 30 tokens, mostly short, of which some tokens may be a tool's; prompts of 1 to 12."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)

    def draw(lengths):
        return [torch.randint(4, 32, (n,), generator=generator).tolist() for n in lengths]

    lengths = (1 - 8 * torch.rand(len(prompts), generator=generator).log()).clamp(max=30).long().tolist()
    completions = [ids[:-1] + [1] if len(ids) % 3 else ids for ids in draw(lengths)]  # two thirds end by themselves
    groups = draw(torch.randint(1, 13, (len(prompts) // 4,), generator=generator).tolist())
    output = {"prompt_ids": [groups[i // 4] for i in range(len(prompts))], "completion_ids": completions}
    return output | {"logprobs": None} | trainer.extra_fields(completions)


def env_mask(completions):
    return {"env_mask": [[int(i % 5 != 3) for i in range(len(ids))] for ids in completions]}


def make_trainer(cls, student, output_dir, teacher=None, extra_fields=lambda completions: {}, **kwargs):
    """With four micro-batches in a step. SGD and no clipping: a wrong scale of the gradient would show."""
    kwargs = {
        "max_completion_length": 30,
        "gradient_accumulation_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        **kwargs,
    }
    if cls is GRPOTrainer:
        config, teacher = tiny.make_config(output_dir, GRPOConfig, **kwargs), {}
    else:
        config = tiny.make_config(output_dir, **{"alpha": 0.5 if teacher else 1.0, **kwargs})
        teacher = {"teacher_model": teacher}
    trainer = cls(student, tiny.reward, config, tiny.make_dataset(), rollout_func=roll_out, **teacher)
    trainer.extra_fields = extra_fields
    return trainer


def train(*args, **kwargs):
    """Weights after five steps."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return dict(trainer.model.named_parameters())


def assert_equal_to_rounding(weights, expected, student):
    start = AutoModelForCausalLM.from_pretrained(student).state_dict()
    assert max((expected[name] - start[name]).abs().max() for name in expected) > 1e-3, "the steps should be large"
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
FEATURES = {
    "beta-two_iterations": {"beta": 0.1, "num_iterations": 2},
    "two_steps_per_generation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "windows_of_another_length": {"gradient_accumulation_steps": 6, "steps_per_generation": 4, "num_iterations": 3},
    "tools": {"extra_fields": env_mask, "num_iterations": 2},
    "mask_truncated": {"mask_truncated_completions": True},
    "entropy_bonus": {"entropy_coef": 0.1},
    "top_entropy": {"top_entropy_quantile": 0.5},
    "off_policy_mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    "multiple_of_four": {"pad_to_multiple_of": 4, "num_iterations": 2},
}
RUNS = [
    *[
        pytest.param(
            {"loss_type": kind, "importance_sampling_level": "token", "num_iterations": 2}, id=f"{kind}-token"
        )
        for kind in LOSS_TYPES
    ],
    *[
        pytest.param(
            {"loss_type": kind, "importance_sampling_level": "sequence", "num_iterations": 2},
            id=f"{kind}-sequence",
            marks=pytest.mark.slow,
        )
        for kind in LOSS_TYPES
    ],
    *[pytest.param(kwargs, id=name) for name, kwargs in FEATURES.items()],
]


@pytest.mark.parametrize("kwargs", RUNS)
def test_a_run_without_padding_equals_grpo(kwargs, tmp_path, student_path):
    if kwargs.get("loss_type") == "luspo":  # its gradients grow with the length
        kwargs = {**kwargs, "learning_rate": 1e-2}
    expected = train(GRPOTrainer, student_path, tmp_path, **kwargs)
    weights = train(RLADTrainer, student_path, tmp_path, **kwargs)
    assert_equal_to_rounding(weights, expected, student_path)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_iterations": 2},
        {"teacher_kl_coef": 0.1, "teacher_kl": "forward", "teacher_top_k": 3},  # lists with (N, 3) of each row
    ],
    ids=["sampled", "named"],
)
def test_with_a_teacher(kwargs, tmp_path, student_path, teacher_path):
    expected = train(RLADTrainer, student_path, tmp_path, teacher_path, **kwargs, trim_padding=False)
    weights = train(RLADTrainer, student_path, tmp_path, teacher_path, **kwargs)
    assert_equal_to_rounding(weights, expected, student_path)


def trust(monkeypatch):
    """Without trying first whether the student may run without padding, which takes passes too."""
    monkeypatch.setattr(RLADTrainer, "_trims", property(lambda trainer: trainer.args.trim_padding))


class OwnLoss(RLADTrainer):
    """One whose loss depends on which rows share a micro-batch: it divides by their tokens."""

    def _compute_loss(self, model, inputs):
        ids, mask = (
            torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], dim=1) for part in ("ids", "mask")
        )
        width = inputs["completion_ids"].size(1)
        logps = self._get_per_token_logps_and_entropies(model, ids, mask, width)[0]
        weights = inputs["completion_mask"] * inputs["advantages"].unsqueeze(1)
        return -(logps * weights).sum() / inputs["completion_mask"].sum()


class Mixin:
    _compute_loss = OwnLoss._compute_loss


class MixedIn(RLADTrainer, Mixin, GRPOTrainer):
    """One whose loss is between ours and TRL's."""


@pytest.mark.parametrize("cls", [OwnLoss, MixedIn])
def test_a_loss_of_ones_own_keeps_its_rows_together(cls, tmp_path, student_path):
    expected = train(cls, student_path, tmp_path, trim_padding=False)
    assert_equal_to_rounding(train(cls, student_path, tmp_path), expected, student_path)


def test_a_loss_that_is_put_in_later_is_seen(tmp_path, student_path, monkeypatch):
    trainer = make_trainer(RLADTrainer, student_path, tmp_path)
    assert trainer._order_is_free
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_compute_loss", OwnLoss._compute_loss)
        assert not trainer._order_is_free
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs)
    assert not trainer._order_is_free


def test_rounding_is_that_of_the_dtype_in_which_the_student_runs(tmp_path, student_path):
    start, kwargs = AutoModelForCausalLM.from_pretrained(student_path).state_dict(), {"max_steps": 1}
    differences = {}
    for bf16 in (False, True):
        both = [
            train(RLADTrainer, student_path, tmp_path, bf16=bf16, trim_padding=trims, **kwargs)
            for trims in (False, True)
        ]
        steps = [torch.cat([(p.detach() - start[name]).flatten() for name, p in each.items()]) for each in both]
        differences[bf16] = ((steps[1] - steps[0]).norm() / steps[0].norm()).item()
    assert differences[False] < 1e-5 and 1e-4 < differences[True] < 3e-2, differences


def test_passes_are_narrower_and_as_many(tmp_path, student_path, monkeypatch):
    widths = {True: [], False: []}
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def record(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs):
        micro_batches = input_ids.split(batch_size or len(input_ids))
        widths[self.args.trim_padding].extend(ids.size(1) for ids in micro_batches)
        assert all(len(ids) == 4 for ids in micro_batches)
        return score(self, model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", record)
    trust(monkeypatch)
    for trim_padding in widths:  # the log-probabilities of the old policy and of the reference, and twice the loss
        train(RLADTrainer, student_path, tmp_path, trim_padding=trim_padding, beta=0.1, num_iterations=2)
    assert len(widths[True]) == len(widths[False]) == 3 * 8 + 5 * 4
    assert sum(widths[True]) < 0.7 * sum(widths[False])


def test_widths_are_multiples_of_what_is_asked_for(tmp_path, student_path, monkeypatch):
    widths = []
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def record(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        widths.append((input_ids.size(1) - logits_to_keep, logits_to_keep))
        return score(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", record)
    trust(monkeypatch)
    train(RLADTrainer, student_path, tmp_path, pad_to_multiple_of=4, num_iterations=2)
    assert all(prompt % 4 == completion % 4 == 0 for prompt, completion in widths)
    assert (
        len({prompt for prompt, _ in widths}) > 1 and len({completion for _, completion in widths}) > 3
    )  # they are cut


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("moe"), tiny.make_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=1,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_student_with_experts_keeps_the_rows_together_whose_load_is_balanced(moe_path, tmp_path):
    expected = train(GRPOTrainer, moe_path, tmp_path)
    weights = train(RLADTrainer, moe_path, tmp_path, trim_padding=True)
    assert_equal_to_rounding(weights, expected, moe_path)


def make_images(counts, sizes):
    """
    A batch as of Qwen-VL: rows with `counts` images each, of `sizes` patches; row i's patches hold 10 * i + which
    image.
    """
    patches = [
        torch.full((size, 3), 10.0 * i + j) for i, count in enumerate(counts) for j, size in enumerate(sizes[:count])
    ]
    return {
        "prompt_mask": torch.ones(len(counts), 2, dtype=torch.long),
        "completion_mask": torch.ones(len(counts), 3, dtype=torch.long),
        "advantages": torch.arange(len(counts)),
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([[1, 1, size] for count in counts for size in sizes[:count]]),
        "num_images": counts,
    }


def test_images_go_along_with_their_rows():
    batch = names.split_pixel_values_by_grid(make_images([1, 2, 1, 2], sizes=[3, 2]))
    halves = [select(batch, rows) for rows in ([2, 1], [0, 3])]
    rows = names.unsplit_pixel_values_by_grid(select(merge(halves), [3, 0, 2]))  # which are rows 3, 2 and 0
    rows = trim(rows)
    assert rows["advantages"].tolist() == [3, 2, 0] and rows["num_images"] == [2, 1, 1]
    assert rows["pixel_values"][:, 0].tolist() == [30, 30, 30, 31, 31, 20, 20, 20, 0, 0, 0]
    assert rows["image_grid_thw"][:, 2].tolist() == [3, 2, 3, 3]


def test_log_probs_of_a_generation_batch_come_back_in_its_order(tmp_path, student_path, monkeypatch):
    """The forward pass is replaced by one that tells the first patch of each row's images, at each of its tokens."""
    batch, trainer = make_images([1, 2, 1, 2], sizes=[3, 2]), make_trainer(RLADTrainer, student_path, tmp_path)
    batch["completion_mask"] = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    widths = []

    def first_patches(self, model, input_ids, attention_mask, logits_to_keep, num_images, pixel_values, **kwargs):
        widths.append(input_ids.size(1))
        starts = [0, 3] if num_images[0] == 1 else [0, 5]
        return pixel_values[starts, :1] * attention_mask[:, -logits_to_keep:], None, None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", first_patches)
    trust(monkeypatch)
    attention_mask = torch.cat([batch.pop("prompt_mask"), batch["completion_mask"]], dim=1)
    images = {key: batch[key] for key in ("pixel_values", "image_grid_thw", "num_images")}
    logps, *_ = trainer._get_per_token_logps_and_entropies(
        None, torch.ones(4, 5, dtype=torch.long), attention_mask, 3, batch_size=2, num_tiles=None, **images
    )
    assert widths == [5, 3]  # rows 1 and 2, then rows 0 and 3
    assert torch.equal(logps, torch.tensor([0.0, 10, 20, 30])[:, None] * batch["completion_mask"])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6), st.sampled_from([1, 4]))
def test_trimming_cuts_padding_and_nothing_else(lengths, multiple):
    prompt_lengths, completion_lengths = torch.tensor(lengths).T[:, :, None]
    batch = {
        "prompt_mask": (torch.arange(12).flip(0) < prompt_lengths).long(),
        "completion_mask": (torch.arange(16) < completion_lengths).long(),
        "advantages": torch.ones(len(lengths)),
        "old_per_token_logps": None,
        "num_items_in_batch": torch.tensor(7),
        "importance_sampling_ratio": torch.ones(len(lengths), 1),
        "pixel_attention_mask": torch.ones(len(lengths), 16, 2),
    }
    batch["prompt_ids"] = torch.arange(12) * batch["prompt_mask"]
    batch["teacher_top_logps"] = (batch["completion_mask"] * torch.arange(16))[:, :, None].expand(-1, -1, 5)
    batch["token_type_ids"] = torch.cat([batch["prompt_mask"], 2 * batch["completion_mask"]], dim=1)
    trimmed = trim(batch, multiple)
    prompt, completion = trimmed["prompt_mask"].size(1), trimmed["completion_mask"].size(1)
    for width, longest in ((prompt, prompt_lengths.max()), (completion, completion_lengths.max())):
        assert longest <= width < max(longest, 1) + multiple and width % multiple == 0
    for key in ("prompt_mask", "prompt_ids"):
        assert torch.equal(trimmed[key], batch[key][:, -prompt:])
    for key in ("completion_mask", "teacher_top_logps"):
        assert torch.equal(trimmed[key], batch[key][:, :completion])
        assert trimmed[key].sum() == batch[key].sum()
    assert torch.equal(trimmed["token_type_ids"], batch["token_type_ids"][:, 12 - prompt : 12 + completion])
    for key in (
        "advantages",
        "old_per_token_logps",
        "num_items_in_batch",
        "importance_sampling_ratio",
        "pixel_attention_mask",
    ):
        assert trimmed[key] is batch[key]


def test_a_masked_out_completion_keeps_its_images():
    batch = make_images([1, 1], sizes=[1])
    batch["completion_mask"] = torch.tensor([[1, 0, 0], [0, 0, 0]])
    assert trim(batch)["completion_mask"].size(1) == 3
    del batch["pixel_values"]
    assert trim(batch)["completion_mask"].size(1) == 1


@pytest.mark.slow
def test_two_processes_under_zero3(tmp_path, student_path):
    saved = {}
    for trim_padding in (True, False):
        options = {"student": student_path, "trim_padding": trim_padding, "num_iterations": 2, "beta": 0.1}
        launch(tmp_path / str(trim_padding), "zero3", worker="padding_worker.py", **options)
        saved[trim_padding] = load_file(tmp_path / str(trim_padding) / "model.safetensors")
    assert_equal_to_rounding(saved[True], saved[False], student_path)


@pytest.mark.slow
def test_two_processes_under_fsdp2(tmp_path, student_path):
    results = [
        launch(
            tmp_path / f"{way}", "ddp", worker="padding_worker.py", student=student_path, fsdp=True, trim_padding=way
        )
        for way in (True, False)
    ]
    for name, expected in results[1][0].items():
        torch.testing.assert_close(torch.tensor(results[0][0][name]), torch.tensor(expected), rtol=0, atol=1e-6)
