"""
Runs the notebook and stores its outputs in it. Needs `pip install nbclient ipykernel`, and two idle cores.

    python benchmarks/run_notebook.py
"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    install = notebook.cells[1]
    command, install.source = install.source, ""  # what is here already
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed, where it is installed, prints what it has found
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    install.source = command
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            cell.metadata.pop("execution", None)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
