"""What the README shows is there: the example of a task, the scripts, and their flags."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
# Commands that run over several lines are one line each.
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if "scripts/" in line]


def test_the_example_of_a_task_is_the_one_that_is_tested():
    example = (ROOT / "tests" / "support" / "own_task.py").read_text().partition("\n")[2].strip()
    assert example in README


def test_python_blocks_are_python():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")


@pytest.mark.parametrize("script", sorted({re.search(r"scripts/\w+\.py", line)[0] for line in COMMANDS}))
def test_scripts_have_the_flags_that_are_shown(script):
    if script == "scripts/app.py":
        pytest.importorskip("gradio", reason="the page needs the extra `app`")
    text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
    for command in COMMANDS:
        if script in command:
            shown = command.partition("#")[0].partition(script)[2]
            for flag in re.findall(r"--\w+", shown):
                assert flag in text, (script, flag)


def test_recipes_that_are_shown_exist():
    for path in re.findall(r"scripts/\S+\.yaml", README):
        assert (ROOT / path).is_file()
