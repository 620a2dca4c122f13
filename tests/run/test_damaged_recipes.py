"""Damaged recipes; see `support/damage.py`."""

from pathlib import Path

import yaml
from hypothesis import given, strategies as st
from support.damage import changed, damaged, fuzz, only

from pdiff_hf.run.cli import ConfigParser
from pdiff_hf.run.config import PDiffConfig


def parse(path: Path, capsys) -> PDiffConfig | None:
    """The recipe, or `None` where it was refused in one line."""
    capsys.readouterr()
    try:
        with only():
            return ConfigParser(prog="train.py").parse_config([str(path)])[0]
    except SystemExit as end:
        text = capsys.readouterr().err
        assert end.code == 2 and text.count("\n") == 1 and "error: " in text, text
        return None


def test_damaged_recipes(room, full, capsys):
    PDiffConfig(select=["norm[-2:]", "ü*"], exclude=["re:.*bias"], model_args='{"img_size": 32}').save("recipe.yaml")
    content = Path("recipe.yaml").read_bytes()
    values = yaml.safe_load(content)
    tags = st.sampled_from(
        [b"!!python/object/apply:os.system ['touch canary']", b"!!binary x", b"!!timestamp 2001-99-99"]
    )
    tags |= st.sampled_from(
        [b"&a [*a]", b"*x", b"? [a]", b"- - -", b"{" * 3000, b"[" * 3000, b"!!int ''", b"1:99:99", b"~"]
    )
    lines = content.splitlines()
    spoilt = st.tuples(st.integers(0, len(lines) - 1), tags).map(
        lambda case: b"\n".join(
            [*lines[: case[0]], lines[case[0]].partition(b":")[0] + b": " + case[1], *lines[case[0] + 1 :]]
        )
    )
    dumped = changed(values).map(lambda case: yaml.safe_dump(case, allow_unicode=True).encode("utf-8", "replace"))

    @given(damaged(content) | dumped | dumped | spoilt)
    def test(case):
        Path("recipe.yaml").write_bytes(case)
        recipe = parse(Path("recipe.yaml"), capsys)
        if recipe is not None:
            recipe.save("again.yaml")
            assert parse(Path("again.yaml"), capsys) == recipe

    fuzz(test, 2000, full)


def test_a_short_recipe_cannot_stand_for_a_long_one(room, capsys):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(12)]
    Path("recipe.yaml").write_text("\n".join([*lines, "select: [*m]"]))
    assert parse(Path("recipe.yaml"), capsys) is None
