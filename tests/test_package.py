"""The distribution: what the wheel holds, who may import whom, and what importing costs."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("dgemma_jax", "interp")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# The layer a file belongs to, and the layers it may import. `top` is what is directly in dgemma_jax.
MAY_IMPORT = {
    "axes": set(),
    "config": {"axes"},
    "progress": set(),
    "weight_sums": set(),
    "nn": {"nn", "axes", "config"},
    "memory": {"nn", "weights", "axes", "config"},
    "diffusion": {"diffusion", "memory", "nn", "axes", "config", "progress", "weight_sums"},
    "text": {"text", "axes", "config"},
    "weights": {"weights", "axes", "config"},
    "bundle": {"diffusion", "memory", "nn", "text", "weights", "axes", "config"},
    "exported": {"diffusion", "memory", "nn", "axes", "config"},
    "train": {"train", "bundle", "diffusion", "memory", "nn", "text", "weights", "axes", "config"},
    "bench": {"bench", "bundle", "diffusion", "memory", "nn", "text", "weights", "train", "axes", "config"},
    "cli": {
        "cli", "bench", "bundle", "exported", "diffusion", "memory", "nn", "text", "weights", "train", "axes", "config",
    },
}
# Third-party packages that have few users, so that replacing one stays a small change.
ONLY_IN = {
    "penzai": r"interp/surgery\.py",
    "orbax": r"dgemma_jax/weights/(orbax|google)\.py|dgemma_jax/train/.*",
    "huggingface_hub": r"dgemma_jax/weights/.*",
    "safetensors": r"dgemma_jax/weights/.*|interp/features/sae_lens_files\.py",
    "tokenizers": r"dgemma_jax/(text|train)/.*",
    "optax": r"dgemma_jax/train/.*|interp/(tuned_lens|features/(linear_fits|sae_training))\.py",
    "pyarrow": r"interp/studies/columns\.py",
    "jinja2": r"dgemma_jax/text/.*",
    "matplotlib": r"interp/.*",
    "rich": r"dgemma_jax/((cli|train|bench)/.*|weights/progress\.py|progress\.py)",
    "scipy": r"interp/.*",
    "torch": r"",
    "transformers": r"",
}
DISTRIBUTION = {"orbax": "orbax-checkpoint"}  # where it is not the name that is imported


def imports(path, root=ROOT):
    """(module, inside a function) of every import that runs; those for type checkers only are left out."""
    package = path.relative_to(root).parts[:-1]

    def visit(node, inside):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from ((".".join(filter(None, [*base, node.module, alias.name])), inside) for alias in node.names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(ast.parse(path.read_text()), False))


def layer(module):
    """The layer of a module of dgemma_jax, or None for the public names of the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else None


def name(path):
    return path.relative_to(ROOT).as_posix()


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_one_way(path):
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module, inside in imports(path):
        top = module.split(".")[0]
        if path.is_relative_to(ROOT / "dgemma_jax"):
            assert top != "interp" or (own == "cli" and inside), f"{name(path)} imports {module}"
        if top == "dgemma_jax" and own is not None:
            if module == "dgemma_jax" or layer(module) is None:  # the public names load everything
                assert own in ("cli", "bench", "train"), f"{name(path)} imports {module}; name the module that has it"
            else:
                assert layer(module) in MAY_IMPORT[own] | {own}, f"{own} may not import {module} ({name(path)})"
        if top in ONLY_IN:
            assert re.fullmatch(ONLY_IN[top], name(path)), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_import_is_a_dependency(path):
    def names(lines):
        return {re.match(r"[\w-]+", line).group().lower().replace("-", "_") for line in lines}

    declared, optional = names(PROJECT["dependencies"]), names(PROJECT["optional-dependencies"]["parquet"])
    for module, inside in imports(path):
        top = module.split(".")[0]
        if top not in PACKAGES and top not in sys.stdlib_module_names:
            allowed = declared | optional if inside else declared
            assert DISTRIBUTION.get(top, top).replace("-", "_") in allowed, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_the_transforms_of_jax(path):
    """nnx modules are plain trees here; nnx.jit costs ten times the call of jax.jit, and mixing hides state."""
    banned = {"jit", "scan", "vmap", "grad", "value_and_grad", "remat", "cond", "while_loop", "split", "merge"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx":
            assert node.attr not in banned, f"{name(path)}:{node.lineno} uses nnx.{node.attr}"


def test_the_finder_of_imports(tmp_path):
    """It sees every form, and tells those that run from those for type checkers."""
    source = tmp_path / "p" / "a.py"
    source.parent.mkdir()
    source.write_text(
        "import os.path\nfrom a import b as c\nif TYPE_CHECKING:\n    import no\ndef f():\n    from . import d\n"
    )
    assert imports(source, tmp_path) == [("os.path", False), ("a.b", False), ("p.d", True)]


def test_import_is_quick_and_light(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import dgemma_jax as dg, dgemma_jax.cli\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))\n"
        "dg.Record, dg.SamplerConfig, dg.prefill, dg.diffusion.accept, dg.diffusion.temperature\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))\n"
    )
    out = run(code, tmp_path)
    assert out.returncode == 0, out.stderr
    first, backends, second = out.stdout.splitlines()
    heavy = {"penzai", "orbax", "safetensors", "tokenizers", "huggingface_hub", "matplotlib", "jinja2", "torch", "rich"}
    assert not set(first.split()) & (heavy | {"jax", "flax", "numpy"})
    assert backends == "False"
    assert not set(second.split()) & (heavy - {"rich"})  # flax.nnx itself loads rich


def test_public_names():
    import dgemma_jax as dg
    import interp

    for package in (dg, interp):
        missing = [public for public in package.__all__ if not hasattr(package, public)]
        assert not missing and set(package.__all__) <= set(dir(package))
        assert package.__all__ == sorted(package.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = package.nothing
    assert callable(interp.explain) and interp.__dist__ == PROJECT["name"]
    assert dg.__version__ in (PROJECT["version"], "0+source")


def test_the_listed_packages_are_those_that_exist():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES if p.name == "__init__.py"}
    assert sorted(listed) == sorted(found | {"dgemma_jax._checkpoints"})
    assert {p.parent for p in SOURCES} == {ROOT / Path(*package.split(".")) for package in found}


def test_the_wheel(tmp_path):
    """Two packages and nothing else, the page and the embedded checkpoints in it; also by way of an sdist."""
    pytest.importorskip("setuptools")
    copy = tmp_path / "source"
    copy.mkdir()
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    for folder in (*PACKAGES, "checkpoints"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "training"))
    (copy / "checkpoints" / "converted").mkdir()
    (copy / "checkpoints" / "converted" / "model.safetensors").write_bytes(b"large")
    (copy / "checkpoints" / "nano").mkdir(exist_ok=True)
    (copy / "checkpoints" / "nano" / "marker").write_bytes(b"small")

    def build(kind, source):
        backend = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(tmp_path)!r}))"
        out = run(backend, source)
        assert out.returncode == 0, out.stderr
        return tmp_path / out.stdout.split()[-1]

    sdist = build("sdist", copy)
    subprocess.run(["tar", "xzf", sdist, "-C", tmp_path], check=True)
    wheel = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"))
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"dgemma_jax-{PROJECT['version']}.dist-info"
    assert {n.split("/")[0] for n in names} == {*PACKAGES, info}
    assert f"{info}/licenses/LICENSE" in names
    expected = {name(path) for path in SOURCES}
    expected |= {name(p) for p in (ROOT / "interp" / "page").rglob("*") if p.is_file()}
    expected |= {name(p) for p in (ROOT / "interp" / "studies" / "papers").glob("*.json")}
    embedded = [p for organism in ("nano", "nano-backdoor") for p in (ROOT / "checkpoints" / organism).glob("*.*")]
    expected |= {name(p).replace("checkpoints", "dgemma_jax/_checkpoints", 1) for p in embedded}
    expected |= {"dgemma_jax/_checkpoints/nano/marker"}
    assert {n for n in names if not n.startswith(info)} == {n for n in expected if "__pycache__" not in n}


def readme_blocks(language):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    return [text for own, text in blocks if own == language]


def test_the_readme_starts_with_two_commands():
    first, second = readme_blocks("bash")
    assert "dgemma explain" in first and "pytest -q" in second
    assert first.count("\n") == second.count("\n") == 1


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
    (example,) = readme_blocks("python")
    out = run(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{example}", tmp_path)
    assert out.returncode == 0, out.stderr
    assert "steps," in out.stdout and "layers.*.resid_post" in out.stdout


def test_the_file_map_is_complete():
    (text,) = [block for block in readme_blocks("") if "dgemma_jax/\n" in block]
    named = set(re.findall(r"[\w/]+\.py", text))
    files = {path.name for path in SOURCES if not path.name.startswith("__")}
    assert named == files


def test_files_name_no_machine():
    """No absolute path of somebody's machine in what is published."""
    texts = [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / ".ci" / "run", *ROOT.glob("colab/*.ipynb")]
    for path in texts:
        found = re.findall(r"(?<![\w.~])/(?:work|root|home|Users)/\w+", path.read_text())
        assert not found, f"{name(path)}: {found}"
