"""What is imported when: quick scripts, and entries in the tables of other libraries."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import pdiff_hf
from pdiff_hf.utils.imports import register_components, require_modules, when_imported

SCRIPTS = Path(__file__).parents[2] / "scripts"
GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "0.2.0" / "tuned_map"


def test_scripts_do_not_wait_for_torch_to_say_what_is_wrong():
    """`--help` and a mistyped flag need none of the libraries that take seconds to import."""
    program = """
import contextlib, io, runpy, sys
for script in ("train", "collect", "evaluate", "generate", "push_to_hub", "reproduce", "app"):
    for argument, code in (("--help", 0), ("--no_such_flag", 2)):
        sys.argv = [f"{sys.path[-1]}/{script}.py", argument]
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            assert end.code == code and output.getvalue(), (script, end.code)
        heavy = {"torch", "diffusers", "datasets", "accelerate", "timm", "transformers", "matplotlib", "gradio"}
        assert not heavy & set(sys.modules), (script, heavy & set(sys.modules))
"""
    program = f"import sys; sys.path.append({str(SCRIPTS)!r})\n{program}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_sampling_imports_only_what_it_computes_with():
    """Not what only figures and metrics need: a generator can be used without them. Nor tasks, for their names."""
    program = f"""
import sys, torch, pdiff_hf.tasks
names = pdiff_hf.tasks.task_names()
assert len(names) >= 5 and not {{f"pdiff_hf.tasks.{{name}}" for name in names}} & set(sys.modules)
from pdiff_hf import PDiffPipeline
pipe = PDiffPipeline.from_pretrained({str(GOLDEN)!r})
pipe(condition={{"angle": 30.0, "invert": "no", "occlude": "none"}}, output_type="model")
print(*{{"matplotlib", "torchmetrics"}} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr


def test_names_of_the_package_are_found_when_they_are_asked_for():
    assert all(getattr(pdiff_hf, name).__name__ == name for name in pdiff_hf.__all__)
    assert dir(pdiff_hf) == sorted([*pdiff_hf.__all__, "__version__"]) and "PDiffTrainer" in pdiff_hf.__all__
    assert pdiff_hf.ModelMixin is ModelMixin and LOADABLE_CLASSES["pdiff_hf"]
    assert timm.is_model("mlp_mini")
    with pytest.raises(AttributeError, match="module 'pdiff_hf' has no attribute 'nothing'"):
        pdiff_hf.nothing  # noqa: B018


def test_a_release_of_diffusers_without_the_table_is_a_warning():
    module = types.ModuleType("pipeline_loading_utils")
    module.LOADABLE_CLASSES = {}
    register_components(module)
    assert module.LOADABLE_CLASSES["pdiff_hf"] == LOADABLE_CLASSES["pdiff_hf"]
    del module.LOADABLE_CLASSES
    with pytest.warns(UserWarning, match="those saved now may not load from the Hub; upgrade pdiff_hf"):
        register_components(module)


def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it(monkeypatch):
    require_modules("this", "report", "torch", "json")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"^FID needs torch_fidelity and no_such: pip install 'pdiff_hf\[fid\]'$"):
        require_modules("FID", "fid", "torch", "torch_fidelity", "no_such")


def test_a_function_is_called_once_after_the_import_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "module_for_a_test.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    called = []
    when_imported("module_for_a_test", lambda module: called.append(module.value))
    assert importlib.util.find_spec("module_for_a_test") is not None  # to look for it is not to import it
    assert called == []
    import module_for_a_test  # noqa: F401

    assert called == [3]
    when_imported("module_for_a_test", lambda module: called.append(2 * module.value))
    assert called == [3, 6]
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "pdiff_hf.utils.imports"]
