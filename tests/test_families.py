"""Every family of models by every road of scoring, against plain forward passes over single, unpadded sequences."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import families


# Those whose cache can't be copied, with the transformers of `constraints.txt`, or doesn't hold all of their state
WITHOUT_SHARED_PROMPTS = {
    "Qwen3-Next",
    "Qwen3.5",
    "Qwen3.5 (images)",
    "Granite 4 hybrid",
    "Falcon-H1",
    "Nemotron-H",
    "LFM2",
    "MiniMax",
    "Mamba 2",
    "RWKV",
}
WITH_IMAGES = [name for name, (_, _, kwargs) in families.FAMILIES.items() if "vision_config" in kwargs]


@pytest.mark.parametrize("attn_implementation", [None, "eager"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_road_gives_the_scores_of_plain_forward_passes(name, attn_implementation):
    if attn_implementation is not None and name in ("Mamba 2", "RWKV"):
        pytest.skip("has no attention")
    roads = families.measure(name, attn_implementation)
    assert roads.keys() >= {"packed", "as a whole", "offloaded"}
    assert ("shared prompts" in roads) == (name not in WITHOUT_SHARED_PROMPTS)
    assert ("images" in roads) == ("images, as a whole" in roads) == (name in WITH_IMAGES)
    assert max(roads.values()) < families.TOLERANCE, roads


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_images_make_a_difference(name):
    model, row = families.make_model(name), families.make_image_rows(name)[0]
    before = families.plain_scores(model, row)
    row["images"]["pixel_values"] = row["images"]["pixel_values"].flip(-1)
    assert (families.plain_scores(model, row) - before).abs().max() > 10 * families.TOLERANCE


def read_table(title):
    """Header and rows of the table in a section of the page."""
    section = families.DOCS.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return header, rows


def test_the_table_in_the_docs_has_every_family():
    header, rows = read_table("The families, by every road")
    assert [row[0] for row in rows] == list(families.FAMILIES)
    shared = header.index("shared prompts")
    assert {row[0] for row in rows if not row[shared]} == WITHOUT_SHARED_PROMPTS
    assert all(float(cell) < families.TOLERANCE for row in rows for cell in row[1:] if cell)


EVERY = {name: cells for name, *cells in read_table("Every causal language model")[1]}
# One for each way to teach and to learn, and those whose logits aren't the LM head's on the last hidden states
SAMPLE = [
    "LlamaForCausalLM",
    "BertLMHeadModel",
    "BloomForCausalLM",
    "CpmAntForCausalLM",
    "DeepseekV4ForCausalLM",
    "GPT2LMHeadModel",
    "InklingForCausalLM",
    "ModernBertDecoderForCausalLM",
    "RecurrentGemmaForCausalLM",
    "RwkvForCausalLM",
]


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
)
def test_a_causal_language_model_teaches_as_the_table_says(name):
    found = families.check(name)
    teaches, difference, student = EVERY[name]
    assert (found["roads"], found["student"]) == (teaches, student)
    assert max(found["difference"], float(difference)) < families.TOLERANCE


def test_the_sample_has_every_way():
    for column in (0, 2):
        assert {EVERY[name][column] for name in SAMPLE} >= {cells[column] for cells in EVERY.values()} - {
            "rows alone, by logits",
            "TRL can't train it",
        }
    assert len(EVERY) > 130
