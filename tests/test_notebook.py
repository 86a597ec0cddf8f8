"""The notebook, cell by cell, with tiny models in place of those that its first cells name."""

import json
from pathlib import Path

import matplotlib
import tiny


NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    tokenizer = tiny.make_chat_tokenizer(CHAT_TEMPLATE)
    student, teacher = (tiny.save_model(tmp_path / str(seed), seed, tokenizer, vocab_size=300) for seed in (0, 1))
    parameters = {"STUDENT": student, "TEACHER": teacher, "TEACHER_LOADING": {}, "STEPS": 2, "PROMPTS": 2, "GROUP": 2}
    parameters |= {"COMPLETION_TOKENS": 8, "BIG": True}  # what isn't in miniature, but with tiny models

    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    install, names, *others = ("".join(cell["source"]) for cell in cells)
    assert install.splitlines()[-1].startswith("%pip install")
    namespace: dict = {}
    exec(names, namespace)
    assert parameters.keys() <= namespace.keys(), "another name for what is to be replaced"
    namespace |= parameters
    for source in others:
        exec(source, namespace)

    trainer = namespace["trainer"]
    assert trainer.state.global_step == 2
    assert all(log["teacher/kl"] > 0 and log["grad_norm"] > 0 for log in namespace["log"] if "loss" in log)
    assert (tmp_path / "rlad-knights" / "adapter_model.safetensors").exists()
    assert (tmp_path / "rlad-knights" / "README.md").exists()
    # A right answer, and what is none
    puzzle = namespace["puzzles"][3]
    said = [f"So <answer>{puzzle['answer']}</answer>", puzzle["answer"], ""]
    completions = [[{"role": "assistant", "content": content}] for content in said]
    assert namespace["right"](completions, [3, 3, 3]) == [1.0, 0.0, 0.0]
