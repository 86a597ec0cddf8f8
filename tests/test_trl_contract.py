"""
Every private name of TRL that `trl_rlad/_trl/` relies on. A failure here names what has moved in the installed TRL.
"""

import inspect
import re

import pytest
import torch
import trl
from transformers import Trainer
from trl import GRPOTrainer
from trl.trainer import utils

from trl_rlad._trl import names, padding


SOURCE = inspect.getsource(GRPOTrainer)
LOSS = inspect.getsource(GRPOTrainer._compute_loss)


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_methods_we_override():
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert parameters(GRPOTrainer._calculate_rewards) == [
        "self",
        "inputs",
        "prompts",
        "completions",
        "completion_ids_list",
    ]
    assert parameters(GRPOTrainer._generate) == ["self", "prompts"]
    assert parameters(GRPOTrainer._tokenize_prompts) == ["self", "prompts"]
    assert "self._get_grad_norm(model" in inspect.getsource(Trainer)
    returned = (
        r"return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images\n"
    )
    assert re.search(returned + "$", inspect.getsource(GRPOTrainer._generate))
    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]
    assert parameters(GRPOTrainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert parameters(GRPOTrainer.create_model_card) == ["self", "model_name", "dataset_name", "tags"]
    assert parameters(GRPOTrainer._get_per_token_logps_and_entropies)[:5] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
    ]
    returned = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).return_annotation
    assert len(returned.__args__) == 3


def test_positional_order_of_the_trainer():
    assert parameters(GRPOTrainer.__init__)[1:4] == ["model", "reward_funcs", "args"]
    assert "teacher_model" not in parameters(GRPOTrainer.__init__)


def test_the_loss_scores_once_and_then_reads_the_old_log_probs():
    assert LOSS.count("self._get_per_token_logps_and_entropies(") == 1
    scored = LOSS.index("self._get_per_token_logps_and_entropies(")
    for read in ('inputs.get("old_per_token_logps")', 'inputs.get("sampling_per_token_logps", old_per_token_logps)'):
        assert LOSS.count(read) == 1 and LOSS.index(read) > scored, read
    assert LOSS.count("log_ratio = per_token_logps - old_per_token_logps") == 1


def test_every_use_of_the_old_log_probs_in_the_loss_is_known():
    # Its reading, its default, the off-policy mask's default, and the ratio: a new use needs a decision in
    # trl_rlad/_trl
    code = re.sub(r"#.*", "", LOSS)
    assert len(re.findall(r"\bold_per_token_logps\b", code)) == 7
    # the ratio: token level, sequence level, VESPO
    assert len(re.findall(r"\blog_ratio\b", code)) == 4
    assert code.count("sampling_per_token_logps") == 4


def test_the_reference_kl_is_weighted_as_we_undo_it():
    assert "if self.args.use_bias_correction_kl:" in LOSS and "per_token_kl = per_token_kl * coef_1" in LOSS


def test_the_reference_kl_is_where_a_penalty_can_be_added():
    # Three times "if there is a reference": the KL, its place in the loss of each token, and its metric
    code = re.sub(r"#.*", "", LOSS)
    assert code.count("self.beta != 0.0") == 3 and code.count("self.beta") == 4
    assert code.count("per_token_loss = per_token_loss + self.beta * per_token_kl") == 1
    assert code.count('inputs["ref_per_token_logps"]') == 1
    assert code.count('self._metrics[mode]["kl"]') == 1


def test_micro_batches_are_buffered_as_we_cut_them_anew():
    prepare = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert parameters(GRPOTrainer._prepare_inputs) == ["self", "generation_batch"]
    assert "split_tensor_dict(generation_batch, self.args.steps_per_generation)" in prepare
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in prepare
    assert "% self.current_gradient_accumulation_steps" in inspect.getsource(GRPOTrainer.training_step)


def test_every_tensor_of_a_batch_is_known():
    # A new one needs a place in padding.py, unless it is over the tokens of the completion or isn't batched
    keys = re.findall(r'output\["(\w+)"\] =', inspect.getsource(GRPOTrainer._generate_and_score_completions))
    completions = {"old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "tool_mask"}
    others = {"importance_sampling_ratio", "num_images", "num_tiles"}
    assert set(keys) == padding.IMAGES | {"token_type_ids", "mm_token_type_ids"} | completions | others


def test_log_probs_of_a_generation_batch_come_without_entropies():
    calls = re.findall(
        r"self\._get_per_token_logps_and_entropies\((.*?)\n +\)",
        inspect.getsource(GRPOTrainer._generate_and_score_completions),
        flags=re.S,
    )
    assert len(calls) == 3 and all("batch_size=batch_size" in call and "compute" not in call for call in calls)
    assert "batch_size" not in LOSS


def test_all_that_depends_on_which_rows_share_a_micro_batch_is_known():
    # Means over its tokens or rows, each by its loss type, and the quantile; our row orders keep to `_order_is_free`
    code = re.sub(r"#.*", "", LOSS)
    assert re.findall(r"\.mean\(\)", code[: code.index("def masked_seq_mean")]) == [".mean()"] * 3
    assert code.count("mask.sum().clamp(min=1.0)") == 2  # bnpo, and the entropy bonus with its `effective_mask`
    assert "if self._entropy_bonus_enabled:" in code and "if self.aux_loss_enabled:" in code
    assert "if self.top_entropy_quantile < 1.0:" in code


def test_columns_that_stay():
    source = inspect.getsource(GRPOTrainer._set_signature_columns_if_needed)
    assert 'self._signature_columns = ["prompt", "image", "images"]' in source


def test_batch_keys():
    for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"):
        assert f'"{key}"' in inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert 'completion_mask * inputs["tool_mask"]' in LOSS


@pytest.mark.parametrize(
    "attribute",
    (
        "_metrics _logs reward_weights reward_func_names num_generations_eval _tokenizer _is_vlm "
        "eos_token_ids epsilon_low epsilon_high importance_sampling_level temperature _buffered_inputs _step "
        "_entropy_bonus_enabled aux_loss_enabled top_entropy_quantile pad_to_multiple_of"
    ).split(),
)
def test_attributes_of_the_trainer(attribute):
    assert re.search(rf"\bself\.{attribute}\b( =|,)", SOURCE)


def test_what_a_model_is_given_for_images():
    inputs = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    others = set(inputs[: inputs.index("compute_aux_loss") + 1]) | {"num_images", "num_tiles"}
    assert set(names.IMAGE_INPUTS) == set(inputs) - others
    for name in (*names.IMAGE_INPUTS, "num_images"):
        assert f'output["{name}"]' in inspect.getsource(GRPOTrainer._generate_and_score_completions)
    batch = {
        "num_images": [1, 2],
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 3),
        "pixel_values": torch.arange(12.0)[:, None],
    }
    assert [len(pixels) for pixels in utils.split_pixel_values_by_grid(batch)["pixel_values"]] == [4, 8]


def test_loss_types_that_clip():
    line = f"if self.loss_type in {list(names.CLIPPED_LOSS_TYPES)}:".replace("'", '"')
    assert line in LOSS[LOSS.index("is_low_clipped") - 200 :]


def test_model_card_attributes():
    assert GRPOTrainer._tag_names == ["trl", "grpo"] and GRPOTrainer._name == "GRPO"
    assert GRPOTrainer._paper.keys() == {"title", "id", "citation"}
    template = utils.pkg_resources.files("trl").joinpath("templates/lm_model_card.md").read_text()
    assert template.count("### Framework versions") == 1


def test_functions():
    assert parameters(utils.add_fused_lm_head)[:2] == ["model", "temperature"]
    assert parameters(utils.create_model_from_path)[0] == "model_id"
    assert parameters(utils.get_config_model_id) == ["config"]
    assert parameters(utils.is_async_callable) == ["func"]
    for function in (utils.split_pixel_values_by_grid, utils.unsplit_pixel_values_by_grid):
        assert parameters(function) == ["batch"]
    assert parameters(utils.maybe_gather_lm_head_ctx) == ["params"]


def test_what_the_logits_are_multiplied_by():
    # `logit_scale` in trl_rlad/_trl repeats TRL's rule. A name more here needs one more there
    source = inspect.getsource(utils.add_fused_lm_head)
    source = source[: source.index("def _fused_forward")]
    names = re.findall(r'getattr\(text_config, "(\w+)"', source)
    assert names == [
        "final_logit_softcapping",
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_scaling",
    ]
    assert 'logits_scaling if text_config.model_type == "hyperclovax" else 1 / logits_scaling' in source


def test_the_backbone_runs_within_the_forward():
    # `LMHead.on_hidden_states` hooks it there
    source = inspect.getsource(utils.add_fused_lm_head)
    assert 'backbone_attr = "base_model"' in source and "getattr(self, backbone_attr)(*args, **kwargs)" in source


def test_versions_tried():
    assert tuple(map(int, trl.__version__.split(".")[:2])) in {(1, 15), (1, 16)}


def test_where_transformers_keeps_the_deepspeed_config():
    from transformers.integrations import deepspeed

    assert hasattr(deepspeed, "_hf_deepspeed_config_weak_ref")
    config = deepspeed.HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    assert deepspeed._hf_deepspeed_config_weak_ref() is config and deepspeed.is_deepspeed_zero3_enabled()
    deepspeed.unset_hf_deepspeed_config()
    assert deepspeed._hf_deepspeed_config_weak_ref is None
