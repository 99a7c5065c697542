"""The notebooks run from top to bottom, and hold no outputs."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """name -> the notebook with its outputs. They follow each other in one kernel, since they compile the same
    programs; each begins in a directory of its own and without names of another."""
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    together = nbformat.v4.new_notebook()
    for name, notebook in notebooks.items():
        begin = f"%reset -f\n%cd -q {tmp_path_factory.mktemp(name)}"
        together.cells += [nbformat.v4.new_code_cell(begin), *notebook.cells]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        nbclient.NotebookClient(together, timeout=300, kernel_name="python3", allow_errors=True).execute()
    return notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the notebook machinery; the kernel has its own
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_it_runs(name, executed):
    shown = [output for cell in executed[name].cells for output in cell.get("outputs", [])]
    assert not ["\n".join(output.traceback) for output in shown if output.output_type == "error"]
    assert any("text/html" in output.get("data", {}) for output in shown)
    assert not [output.text for output in shown if output.output_type == "stream" and output.name == "stderr"]
