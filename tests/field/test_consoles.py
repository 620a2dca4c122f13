"""The terminals that people start scripts from, and those that are none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support.run_server import FLAGS

import pdiff_hf

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ("train", "collect", "generate", "evaluate", "push_to_hub", "app", "reproduce")
START = """
import io, os, runpy, sys
what, script, *arguments = sys.argv[1:]
if what == "none":
    os.close(1)
    sys.stdout = None
elif what == "head":
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)
else:
    sys.stdout.reconfigure(encoding=what, errors="strict")
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
CONSOLES = pytest.mark.parametrize("console", ["iso8859-1", "ascii", "cp437", "none", "head"])


@CONSOLES
def test_the_summary_at_the_end_of_a_run(console, run_server, whole_run):
    """The run is finished, so that all there is to do is to say what has come out."""
    folder, _ = whole_run
    result = run_server.program(START, console, SCRIPTS / "train.py", *FLAGS, f"--output_dir={folder}")
    assert "Traceback" not in result.errors and "Error" not in result.errors
    assert result.status == (console == "head")  # as other programs end whose reader has gone
    if console not in ("none", "head"):
        assert f"The generator is in {folder}" in result.output and "generated" in result.output


@CONSOLES
@pytest.mark.parametrize("name", ["train", "generate"])
def test_help(console, name, run_server):
    result = run_server.program(START, console, SCRIPTS / f"{name}.py", "--help")
    assert result.status == 0 and result.errors == ""
    assert console in ("none", "head") or "usage:" in result.output


def test_without_docstrings():
    """Some images set it. (Libraries that a run needs cannot be used without theirs.)"""
    code = "import runpy, sys\nfor script in sys.argv[1:]:\n    sys.argv = [script, '--help']\n"
    code += "    try: runpy.run_path(script, run_name='__main__')\n    except SystemExit as end:\n"
    code += "        if end.code != 0: raise"
    scripts = [str(SCRIPTS / f"{name}.py") for name in NAMES]
    done = subprocess.run([sys.executable, "-BOO", "-c", code, *scripts], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage:") == len(NAMES), done.stderr


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale():
    """A report has letters that ISO 8859-1 lacks, and a folder goes from one machine to another."""
    rooms = [Path(pdiff_hf.__file__).parent, SCRIPTS, SCRIPTS.parent / "pipelines"]
    found = []
    for path in (path for room in rooms for path in room.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            is_method = isinstance(call.func, ast.Attribute)
            mode = next((a.value for a in call.args[not is_method :] if isinstance(a, ast.Constant)), "r")
            opens = name == "open" and not is_method and "b" not in str(mode)
            if (opens or name in ("read_text", "write_text")) and "encoding" not in [k.arg for k in call.keywords]:
                found.append(f"{path.name}:{call.lineno}")
    assert found == []
