"""What people mistype, and what goes wrong in their own files: one line that says what to do."""

import textwrap

import pytest
from support.run_server import ROOT
from support.scripts import run_script

from pdiff_hf.tasks import task_class
from pdiff_hf.utils.errors import users_line
from pdiff_hf.utils.seeds import derive_seed
from pdiff_hf.utils.terminal import MAX_VALUE, shorten

OWN = ROOT / "docs" / "snippets" / "clouds.py"


def line_of(capsys) -> str:
    """The one line of an error in a flag."""
    *usage, line = capsys.readouterr().err.strip().splitlines()
    assert all(text.startswith(("usage:", " ")) for text in usage)
    return line


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train", ["on_demnd.yaml"], "there is no recipe 'on_demnd.yaml'; did you mean on_demand.yaml"),
        ("train", ["nothing/like/it.yml"], "there is no recipe 'nothing/like/it.yml'"),
        ("train", ["--num_snapshot", "3"], "unknown argument '--num_snapshot'; did you mean num_snapshots"),
        ("app", ["--port", "99999"], "a port is a number from 1 to 65535, got 99999"),
        ("app", ["--port", "http"], "invalid port value: 'http'"),
        ("generate", ["x", "--condition", "{angle: 37}"], "is not JSON"),
    ],
)
def test_a_mistyped_flag(script, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(monkeypatch, f"{script}.py", *arguments)
    assert end.value.code == 2 and message in line_of(capsys)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train", ["--task_args", "x" * 20_000]),
        ("train", ["--family_args", "[1, " * 5000]),
        ("train", ["--stages", *["collect"] * 3, "y" * 20_000]),
        ("train", [f"--{'z' * 20_000}"]),
        ("generate", ["pipeline", "--condition", "[1, " * 5000]),
    ],
)
def test_a_long_value_is_cut(script, arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, f"{script}.py", *arguments)
    assert len(line_of(capsys)) < MAX_VALUE + 200


def test_what_is_cut_is_values_alone():
    said = "the generator's " + "words of a message " * 30 + "and the network's"
    assert shorten(said) == said
    for value in (f"'{'a b ' * 100}'", f"[{'1, ' * 200}]", "/" + "folder/" * 100):
        short = shorten(f"it must be\n  shorter, got {value} , so make it shorter")
        assert short.startswith(f"it must be shorter, got {value[:190]}") and short.endswith("... , so make it shorter")
        assert len(short) < MAX_VALUE + 60


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken", "import no_such_module\n", "No module named 'no_such_module' (.*broken.py, line 1: import no_such"),
        ("colon", "class Clouds\n    pass\n", r"SyntaxError: expected ':'.* \(.*colon.py, line 1: class Clouds\)"),
        ("zero", "x = 1\ny = x / 0\n", r"ZeroDivisionError: division by zero \(.*zero.py, line 2: y = x / 0\)"),
    ],
)
def test_a_file_of_ones_own_that_cannot_be_imported(name, content, message, tmp_path):
    (tmp_path / f"{name}.py").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("module' (", r"module' \(")):
        task_class(f"{tmp_path / name}.py:Clouds")


@pytest.mark.parametrize(
    ("raised", "message"),
    [("KeyError('pointz')", "KeyError: 'pointz'"), ("ValueError('no such points')", "no such points")],
)
def test_an_error_in_the_middle_of_ones_own_task(raised, message, run_server, tmp_path):
    text = OWN.read_text(encoding="utf-8") + textwrap.dedent(f"""

        class Broken(Clouds):
            def collate(self, examples):
                raise {raised}
        """)
    (tmp_path / "own.py").write_text(text, encoding="utf-8")
    flags = ["--select=all", "--base_epochs=1", "--num_snapshots=16", "--latent_dim=8"]
    result = run_server.run(tmp_path / "out", f"--task={tmp_path / 'own.py'}:Broken", *flags)
    last = result.errors.strip().splitlines()[-1]
    assert result.status == 1 and "Traceback" not in result.errors
    assert last.startswith(f"error: {message} (") and last.endswith(
        f"own.py, line {text.count(chr(10))}: raise {raised})"
    )


def test_an_error_of_this_library_has_no_line_of_ones_own():
    """Its traceback is kept, because it helps to mend it."""
    with pytest.raises(TypeError) as caught:
        derive_seed("one")
    assert "test_messages.py" in users_line(caught.value)  # which called it
    caught.value.__traceback__ = caught.value.__traceback__.tb_next
    assert users_line(caught.value) == ""
