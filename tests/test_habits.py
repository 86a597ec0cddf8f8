"""What is said twice about the project, and the command whose output an issue is to have."""

import configparser
import re
import tomllib
from pathlib import Path

import yaml

from trl_rlad.cli import main


ROOT = Path(__file__).parent.parent


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_env_names_the_versions(capsys):
    main(["env"])
    output = capsys.readouterr().out
    versions = dict(re.findall(r"^- (.+) version: (\S.*)$", output, re.MULTILINE))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert versions["trl-rlad"].split("+")[0] == setup["metadata"]["version"] == read("CITATION.cff")["version"]
    assert {
        "TRL",
        "PyTorch",
        "Transformers",
        "DeepSpeed",
        "vLLM",
        "httpx2",
        "tenacity",
        "reasoning-gym",
    } <= versions.keys()
    assert "trl-rlad env" in read(".github/ISSUE_TEMPLATE/bug.yml")["body"][0]["attributes"]["description"]


def test_the_gate_is_one():
    gate = (ROOT / ".ci/run").read_text()
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert jobs["gate"]["steps"][-1] == {"run": ".ci/run"}
    assert jobs["trl-main"]["steps"][-1]["run"].startswith("tests/compat/run git+https://github.com/huggingface/trl")
    for hook in read(".pre-commit-config.yaml")["repos"][0]["hooks"]:
        assert f".venv/bin/{hook['name']}" in gate, hook
    assert "tests/wheel/run" in (ROOT / ".github/workflows/release.yml").read_text()


def test_the_main_job_says_what_it_needs_where_nothing_is_installed():
    header = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", (ROOT / "examples/rlad_grpo.py").read_text())[1]
    (requirement,) = tomllib.loads(re.sub("^# ?", "", header, flags=re.MULTILINE))["dependencies"]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, extras = re.fullmatch(r"([\w-]+)\[(.*)\]", requirement).groups()
    assert name == setup["metadata"]["name"] and set(extras.split(",")) <= set(setup["options.extras_require"])
