"""
Which models teach by which roads: for a tiny random model of each, the scores against plain forward passes over
single, unpadded sequences. It writes the tables of `docs/families.md`: every causal language model of transformers by
the roads that the trial at the start has chosen for it, and some families by every road.

    python benchmarks/families.py

What has been measured stands in `results/families.jsonl`, and a run goes on from there.
"""

import argparse
import json
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_rlad import RLADConfig, TeacherScorer
from trl_rlad._trl.trimming import TrimmingGRPOTrainer
from trl_rlad.scoring import RowScorer
from trl_rlad.teachers import LocalTeacher
from trl_rlad.teachers.local import WrappedTeacher


DOCS = Path(__file__).parent.parent / "docs" / "families.md"
RESULTS = Path(__file__).parent / "results" / "families.jsonl"
TOLERANCE = 1e-4  # nats, in float32
TEMPERATURE = 0.7
PROMPT, COMPLETIONS, WINDOW = 20, (6, 5, 3, 1), 4  # the windows of sliding attention are shorter than a prompt
IMAGE = 31  # the placeholder token

# Most families know most of these, and ignore the rest
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
NO_HEAD_DIM = {name: value for name, value in TEXT.items() if name != "head_dim"}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
GEMMA_4 = {"global_head_dim": 8, "vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

# Name: (causal language model, configuration, its arguments)
FAMILIES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", TEXT | EXPERTS),
    "Qwen3-Next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        TEXT | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16},
    ),
    "Qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", TEXT | LINEAR),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", TEXT | {"sliding_window": WINDOW}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", TEXT | SLIDING),
    "Gemma 4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        TEXT | SLIDING | GEMMA_4,
    ),
    "Mistral": ("MistralForCausalLM", "MistralConfig", TEXT | {"sliding_window": WINDOW}),
    "Ministral 3": ("Ministral3ForCausalLM", "Ministral3Config", TEXT),
    "Phi": ("PhiForCausalLM", "PhiConfig", NO_HEAD_DIM),
    "Phi 3": ("Phi3ForCausalLM", "Phi3Config", NO_HEAD_DIM),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", TEXT | SLIDING | LOCAL_EXPERTS),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", NO_HEAD_DIM),
    "Cohere 2": ("Cohere2ForCausalLM", "Cohere2Config", NO_HEAD_DIM | SLIDING | {"tie_word_embeddings": True}),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        NO_HEAD_DIM
        | ROUTED_EXPERTS
        | LATENT
        | {"num_key_value_heads": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "GLM-4": ("Glm4ForCausalLM", "Glm4Config", TEXT),
    "GLM-4 MoE": ("Glm4MoeForCausalLM", "Glm4MoeConfig", TEXT | ROUTED_EXPERTS | {"first_k_dense_replace": 1}),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", NO_HEAD_DIM),
    "OLMo 3": ("Olmo3ForCausalLM", "Olmo3Config", NO_HEAD_DIM | SLIDING),
    "Granite 4 hybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        NO_HEAD_DIM
        | LOCAL_EXPERTS
        | MAMBA
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, "logits_scaling": 2.0},
    ),
    "Falcon-H1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        NO_HEAD_DIM | MAMBA | {"mamba_d_ssm": 32, "lm_head_multiplier": 0.5},
    ),
    "Nemotron-H": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        TEXT
        | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8}
        | {"ssm_state_size": 8, "chunk_size": 8, "n_groups": 1},
    ),
    "LFM2": ("Lfm2ForCausalLM", "Lfm2Config", NO_HEAD_DIM | {"layer_types": ["conv", "full_attention"]}),
    "MiniMax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        TEXT | LOCAL_EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    ),
    "Mamba 2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {name: TEXT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}
        | {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    ),
    "RWKV": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {name: TEXT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        | {"attention_hidden_size": 16, "intermediate_size": 32, "context_length": 128},
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": NO_HEAD_DIM | MROPE,
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 16},
        },
    ),
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"text_config": TEXT | MROPE, "vision_config": QWEN_VISION},
    ),
    "Qwen3.5 (images)": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {"text_config": TEXT | LINEAR, "vision_config": QWEN_VISION},
    ),
    "Gemma 3 (images)": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": TEXT | SLIDING, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "Gemma 4 (images)": (
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "text_config": TEXT | SLIDING | GEMMA_4,
            "vision_config": VISION
            | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 16},
            "audio_config": None,
        },
    ),
    "Ministral 3 (images)": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": TEXT | {"model_type": "ministral3"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "spatial_merge_size": 1,
        },
    ),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
            "vision_feature_layer": -1,
        },
    ),
    "SmolVLM": (
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION, "scale_factor": 1},
    ),
}


def make_model(name: str, attn_implementation: str | None = None) -> PreTrainedModel:
    """A random model of a family, in float32, with the attention that transformers chooses for it or another."""
    model_class, config_class, kwargs = FAMILIES[name]
    if "text_config" in kwargs:
        kwargs = kwargs | {"image_token_id": IMAGE, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**kwargs)).eval()
    for parameter in model.parameters():
        if not parameter.any():  # biases and, in Gemma 3, all that the images have to say
            torch.nn.init.normal_(parameter, std=0.3)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model


def make_text_rows() -> list[dict]:
    """Completions of one prompt."""
    generator = torch.Generator().manual_seed(0)
    prompt, *completions = (torch.randint(4, 30, (n,), generator=generator) for n in (PROMPT, *COMPLETIONS))
    return [{"prompt": prompt, "completion": completion, "images": {}} for completion in completions]


def make_image_rows(name: str) -> list[dict]:
    """Rows with one, two, no and two images of four placeholders (or two, for the small ones of Qwen)."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count, row in zip((1, 2, 0, 2), make_text_rows(), strict=True):
        sizes = [(4, 4), (2, 4)][:count] if name.startswith("Qwen") else [(4, 4)] * count
        prompt = row["prompt"][: 3 + count]
        for height, width in sizes:
            prompt = torch.cat([prompt, torch.full((height * width // 4,), IMAGE), row["prompt"][-2:]])
        types = (torch.cat([prompt, row["completion"]]) == IMAGE).long()
        if not count:
            images = {}
        elif name.startswith("Qwen"):
            patches = sum(height * width for height, width in sizes)
            images = {
                "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=generator),
                "image_grid_thw": torch.tensor([(1, height, width) for height, width in sizes]),
                "mm_token_type_ids": types,
            }
        elif name.startswith("Gemma 4"):
            positions = torch.tensor([(x, y) for y in range(4) for x in range(4)])
            images = {
                "pixel_values": torch.rand(count, 16, 3 * 4 * 4, generator=generator),
                "image_position_ids": positions.expand(count, -1, -1),
                "mm_token_type_ids": types,
            }
        else:
            images = {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}
            if name.startswith("Gemma"):
                images["token_type_ids"] = types
            if name == "SmolVLM":
                images["pixel_values"] = images["pixel_values"][None]
            if name.startswith("Ministral"):
                images["image_sizes"] = torch.tensor([[8, 8]] * count)
        rows.append({"prompt": prompt, "completion": row["completion"], "images": images, "count": count})
    return rows


def make_batch(rows: list[dict]) -> dict:
    """
    The rows as TRL has them: prompts padded on the left, completions on the right, and the images of all in a row.
    """

    def pad(sequences, side="right"):
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_side=side)

    batch = {}
    for part, side in (("prompt", "left"), ("completion", "right")):
        batch[f"{part}_ids"] = pad([row[part] for row in rows], side)
        batch[f"{part}_mask"] = pad([torch.ones_like(row[part]) for row in rows], side)
    widest, with_images = batch["prompt_ids"].size(1), [row for row in rows if row["images"]]
    for key in with_images[0]["images"] if with_images else ():
        if key.endswith("token_type_ids"):
            batch[key] = torch.zeros(len(rows), widest + batch["completion_ids"].size(1), dtype=torch.long)
            for types, row in zip(batch[key], rows, strict=True):
                start = widest - len(row["prompt"])
                types[start : start + len(row["prompt"])] = (row["prompt"] == IMAGE).long()
        elif with_images[0]["images"][key].dim() == 5:  # padded to the same number of images, and in every row
            batch[key] = torch.zeros(len(rows), 2, 3, 8, 8)
            for pixels, row in zip(batch[key], rows, strict=True):
                pixels[: row["count"]] = row["images"][key][0] if row["count"] else 0.0
        else:
            batch[key] = torch.cat([row["images"][key] for row in with_images])
    return batch | ({"num_images": [row["count"] for row in rows]} if with_images else {})


# Any configuration, made small: what it calls its sizes, and what they become
SIZES = {
    32: "vocab_size vocab_size_per_layer_input intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff "
    "d_inner n_inner feed_forward_size shared_intermediate_size shared_expert_intermediate_size lru_width mamba_d_ssm",
    16: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim output_embedding_size attention_hidden_size "
    "cross_attention_hidden_size input_embedding_size moe_intermediate_size router_hidden_size expert_hidden_size",
    8: "head_dim attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim q_lora_rank kv_lora_rank index_head_dim indexer_head_dim rotary_dim "
    "dim_head global_head_dim mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size block_size "
    "mamba_d_head attention_head_size hidden_size_per_layer_input mamba_head_dim mamba_headdim",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts sliding_window attention_window_size "
    "window_size mamba_n_heads mamba_num_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_attention_heads "
    "n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads linear_num_key_heads "
    "linear_num_value_heads linear_num_heads index_n_heads indexer_n_heads n_mamba_heads num_experts_per_tok moe_topk "
    "num_experts_per_token moe_k",
    1: "num_key_value_heads indexer_kv_heads mamba_n_groups n_groups mamba_ngroups n_group topk_group "
    "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers",
    128: "max_position_embeddings n_positions n_ctx max_seq_len context_length",
    0.3: "initializer_range init_std",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= {"is_decoder": True, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "logits_soft_cap": 1.0}
SMALL |= {"attn_layer_indices": [1], "attn_layer_offset": 1, "attn_layer_period": 2}  # of the hybrids


def make_any(model_class: str) -> PreTrainedModel:
    """A random model of a class in `AutoModelForCausalLM`, from its default configuration with small sizes."""
    for family, (name, *_) in FAMILIES.items():
        if name == model_class:
            return make_model(family)
    error: Exception | None = None
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name != model_class:
            continue
        config_class = CONFIG_MAPPING[model_type]
        default = config_class().to_dict()
        own = default.keys() | config_class.attribute_map.keys()
        numbers = {n: v for n, v in SMALL.items() if n in own and not isinstance(default.get(n), (list, dict))}
        # Not every class takes no first token, or fewer key-value heads than heads
        for extra in ({}, {"bos_token_id": 2}, {"num_key_value_heads": 2}, {"num_hidden_layers": 4}):
            try:
                config = config_class(**numbers | {n: v for n, v in extra.items() if n in own})
                torch.manual_seed(0)
                with torch.device("meta"):
                    size = sum(p.numel() for p in getattr(transformers, model_class)(config).parameters())
                if size > 10**6:
                    raise ValueError(f"{size} parameters")
                torch.manual_seed(0)
                model = getattr(transformers, model_class)(config).eval()
                plain_scores(model, make_text_rows()[0])
                return model
            except Exception as failure:
                error = error or failure
    raise ValueError(f"{model_class} can't be built tiny: {error}") from error


def how_it_teaches(teacher: LocalTeacher) -> str:
    """The roads that the trial has chosen."""
    rows = "shared prompts" if teacher.shares_prompts else "mixed rows" if teacher.mixes_rows else "rows alone"
    return rows + (", by logits" if teacher.reads_logits else "")


def trims(model: PreTrainedModel) -> bool:
    """Whether the padding of a student is cut off: the trainer's own trial, without the rest of a trainer."""
    trainer = TrimmingGRPOTrainer.__new__(TrimmingGRPOTrainer)
    trainer.args, trainer.model = RLADConfig("none", use_cpu=True, bf16=False), model
    trainer.accelerator = Accelerator(cpu=True)
    return trainer._trims


def check(model_class: str) -> dict[str, str | float]:
    """What the trial says of a tiny model of this class, and the largest difference in nats from plain passes."""
    model, rows = make_any(model_class), make_text_rows()
    expected = [plain_scores(model, row) for row in rows]
    try:
        teacher = make_teacher(LocalTeacher, model)
        roads = {"roads": how_it_teaches(teacher), "difference": difference(teacher, rows, expected)}
    except ValueError as error:
        return {"roads": f"refused: {str(error).splitlines()[0]}"}
    try:
        return roads | {"student": "without padding" if trims(model) else "as TRL does"}
    except Exception:
        return roads | {"student": "TRL can't train it"}


def make_teacher(teacher_class, model):
    """A teacher of this model, which has a tokenizer only as far as the teacher looks for one."""
    with tempfile.TemporaryDirectory() as folder:
        vocab = {f"w{i}": i for i in range(TEXT["vocab_size"])}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w3")))
        tokenizer.save_pretrained(folder)
        model.config._name_or_path = folder
        args = RLADConfig(folder, use_cpu=True, bf16=False, temperature=TEMPERATURE, teacher_offload="cpu")
        return teacher_class(model, args, Accelerator(cpu=True))


def difference(teacher, rows, expected) -> float:
    batch = make_batch(rows)
    scorer = TeacherScorer({"": RowScorer(teacher, teacher.accelerator, 200)})
    scores = scorer.score(batch, batch["completion_mask"])["teacher_per_token_logps"]
    pairs = zip(scores, expected, strict=True)
    return max((score[: len(logps)] - logps).abs().max().item() for score, logps in pairs)


@torch.no_grad()
def plain_scores(model: PreTrainedModel, row: dict) -> torch.Tensor:
    """`log_softmax(logits / temperature)` of one completion by itself."""
    inputs = {k: v[None] if k.endswith("token_type_ids") else v for k, v in row["images"].items()}
    logits = model(input_ids=torch.cat([row["prompt"], row["completion"]])[None], **inputs).logits[0]
    logps = (logits[len(row["prompt"]) - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return logps.gather(1, row["completion"][:, None])[:, 0]


@contextmanager
def moving_weights(teacher: LocalTeacher):
    """Without a GPU, a copy on the same device stands for the weights on their visit."""
    move = teacher.model.to
    teacher.model.to = lambda device: teacher.model._apply(torch.clone) and move(device)
    yield
    del teacher.model.to


def measure(name: str, attn_implementation: str | None = None) -> dict[str, float]:
    """Largest difference in nats of each road that is open to a family."""
    model = make_model(name, attn_implementation)
    text, images = make_text_rows(), make_image_rows(name) if "text_config" in FAMILIES[name][2] else []
    expected, with_images = ([plain_scores(model, row) for row in rows] for rows in (text, images))
    teacher, whole = (make_teacher(each, model) for each in (LocalTeacher, WrappedTeacher))
    roads = {}
    if images:  # first, as some models remember the last image
        roads["images"] = difference(teacher, images, with_images)
        roads["images, as a whole"] = difference(whole, images, with_images)
    if teacher.shares_prompts:
        roads["shared prompts"] = difference(teacher, text, expected)
        teacher.shares_prompts = False
    roads["packed"], roads["as a whole"] = (difference(each, text, expected) for each in (teacher, whole))
    with moving_weights(teacher):
        roads["offloaded"] = difference(teacher, text, expected)
    return roads


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    results = {row.pop("model"): row for row in known}
    for model_class in tqdm(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) - results.keys())):
        try:
            results[model_class] = check(model_class)
        except Exception as error:
            results[model_class] = {"error": str(error).splitlines()[0]}
        with RESULTS.open("a") as file:
            file.write(json.dumps({"model": model_class, **results[model_class]}) + "\n")
    built = {name: row for name, row in sorted(results.items()) if "error" not in row}
    every = [
        [name, row["roads"], f"{row['difference']:.0e}" if "difference" in row else "", row.get("student", "")]
        for name, row in built.items()
    ]
    names = ["packed", "shared prompts", "as a whole", "offloaded", "images", "images, as a whole"]
    families = []
    for family in tqdm(FAMILIES):
        roads = measure(family)
        families.append([family, *(f"{roads[name]:.0e}" if name in roads else "" for name in names)])
    left_out = ", ".join(name for name in sorted(results) if name not in built)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl"))
    page = DOCS.read_text().split("## The families, by every road")[0]
    DOCS.write_text(
        f"{page}## The families, by every road\n\n{table(['family', *names], families)}\n\n"
        f"## Every causal language model\n\n{table(['model', 'teaches by', 'difference', 'as a student'], every)}\n\n"
        f"Not built from sizes alone: {left_out}.\n\nMeasured with {versions}.\n"
    )


if __name__ == "__main__":
    main()
