"""The benchmark that a GPU is to run, in its tiny form: all of it that needs neither a GPU nor the package index."""

import json
import sys
from pathlib import Path

import pytest
import tiny


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_runs_to_its_end_and_goes_on(tmp_path, monkeypatch, capsys):
    tokenizer = tiny.make_chat_tokenizer(CHAT_TEMPLATE)
    base = tmp_path / "parts" / "language_model" / "base"  # in place of the checkpoint
    tiny.save_model(base, 0, tokenizer=tokenizer, vocab_size=len(tokenizer))
    for name in ("OMP_NUM_THREADS", "TQDM_DISABLE"):  # which the study sets for its processes
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--output_dir", str(tmp_path)])
    gpu.main()
    printed = capsys.readouterr().out
    missing = {"scoring_8k", "main_job"}
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu.PARTS if name not in missing}
    assert all(result["versions"]["trl"] and result["date"] and result["device"] for result in results.values())
    for attention in ("eager", "sdpa"):
        errors = results["parity"]["figures"][attention]
        assert 0.0 < errors["+ shared prompts"][0] < 1.5 * errors["TRL, padded"][0]
    halved = results["out_of_memory"]["figures"]
    assert halved["tokens_per_batch"] < 10**9 and halved["error"] < 1e-4
    assert "| RLAD + named |" in results["language_model"]["printed"]
    assert "Mean reward of the rollouts" in results["zero3_offload"]["printed"]

    (tmp_path / "parity.json").unlink()
    monkeypatch.setattr(gpu, "run", lambda name, *_: pytest.fail(name) if name != "parity" else {"seconds": 1})
    gpu.main()
    assert capsys.readouterr().out.count("there already") == len(gpu.PARTS) - len(missing) - 1
    assert "left out" in printed


def test_no_figures_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="There is no GPU here"):
        gpu.main()
    assert not list(tmp_path.glob("*.json"))
