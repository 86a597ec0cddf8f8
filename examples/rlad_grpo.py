# /// script
# dependencies = ["trl-rlad[tasks,math,peft]"]
# ///
"""
The main job: train a student with reinforcement learning while a teacher guides it, as `trl-rlad train` does.

Without arguments: chains of operators, offline, with two of the small models in `examples/mini/`, a student that has
half learned the task and its teacher. It takes a minute on two CPU cores. `--method grpo`, `kdrl` or `rlad_named` is
another method. Knights and knaves, with a student that is sure and wrong: `--config examples/mini/knights.yaml`.

    accelerate launch examples/rlad_grpo.py

Any of reasoning-gym's tasks, with any student and teacher:

    accelerate launch examples/rlad_grpo.py \
        --task knights_knaves --task_kwargs '{"n_people": [3, 4, 5, 6]}' \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B \
        --max_completion_length 2048 --output_dir outputs/qwen3-0.6b-rlad

or on any dataset, as `trl grpo` takes it:

    accelerate launch examples/rlad_grpo.py --dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B

or the same in a file: `--config FILE.yaml`. Those of the paper's runs are in `examples/recipes/`, and those of the
methods, for any run, in `examples/methods/`: `--config examples/methods/grpo.yaml` is the GRPO baseline, and
`rlad.yaml` the paper's form of RLAD. On a rented GPU, with nothing installed: `hf jobs uv run --flavor a10g-small
examples/rlad_grpo.py ...`.
"""

from trl_rlad.scripts.train import main


if __name__ == "__main__":
    main()
