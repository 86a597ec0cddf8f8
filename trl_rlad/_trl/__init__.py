"""
The only room that touches TRL's private methods and attributes, but for class attributes that are set by their name in
`config.py` and `trainer.py`. `tests/test_trl_contract.py` pins every name used here.

- `GRPOTrainer._generate_and_score_completions`: its dict is shuffled, split and buffered; what is added goes along.
- `GRPOTrainer._tokenize_prompts`, which returns token ids first.
- `GRPOTrainer._generate`, which returns token ids of prompts and completions, the masks of tools, and with them
  images.
- `GRPOTrainer._calculate_rewards`, which returns the rewards of all processes, a column for each reward function.
- `GRPOTrainer._compute_loss`, and in it the one call of `_get_per_token_logps_and_entropies` (a 3-tuple since 1.7)
  that comes before `inputs.get("old_per_token_logps")` and `inputs.get("sampling_per_token_logps", old)` are read, and
  `self.beta * per_token_kl`, which it adds to the loss of each token if `self.beta != 0.0`.
- `GRPOTrainer._prepare_inputs`, which shuffles a generation batch and cuts it into the micro-batches of
  `_buffered_inputs`, of which it returns number `_step % steps_per_generation`; and the calls of
  `_get_per_token_logps_and_entropies` with a `batch_size`, for the log-probabilities of the old policy and the
  reference.
- `Trainer._get_grad_norm`, which is called before the optimizer's step.
- `GRPOTrainer._entropy_bonus_enabled`, `aux_loss_enabled`, `top_entropy_quantile` and `pad_to_multiple_of`.
- `GRPOTrainer._set_signature_columns_if_needed`, which lists the columns that `remove_unused_columns` keeps.
- `GRPOTrainer._logs`, whose `prompt` and `extra` are columns of the table of completions.
- `GRPOTrainer._metrics`, `_tokenizer`, `_is_vlm`, `eos_token_ids`, `importance_sampling_level`, `epsilon_low` and
  `epsilon_high`; `_tag_names`, `_name` and `_paper`, which feed the model card.
- The inputs beside the tokens that the student's forward pass is given for images, and `split_pixel_values_by_grid`.
- `trl.trainer.utils`: `add_fused_lm_head` (since 1.15), `create_model_from_path`, `get_config_model_id`,
  `get_comet_experiment_url`, `get_trackio_space_url`, `is_async_callable`, `maybe_gather_lm_head_ctx`, `use_adapter`,
  `split_pixel_values_by_grid` and its opposite; `trl.models.prepare_fsdp`.
"""
