"""Conditions from a table: types of columns, unknown cells, and what is refused."""

import pytest

from pdiff_hf.models import ConditionError
from pdiff_hf.snapshots.conditions import read_conditions


def write(tmp_path, text: str):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def test_columns_of_every_type(tmp_path):
    text = (
        "network,angle:angle,rank,domain,label:category,embedding\n"
        'a.safetensors,30,8,news,1,"[0.5, 1]"\n'
        '"b, c",-30.5,16,,2,\n'
        'org/d,,8,law,1,"[1, 2]"\n'
    )
    conditions, fields = read_conditions(write(tmp_path, text))
    assert conditions["b, c"] == {"angle": -30.5, "rank": 16, "domain": None, "label": "2", "embedding": None}
    assert conditions["org/d"] == {"angle": None, "rank": 8, "domain": "law", "label": "1", "embedding": [1, 2]}
    assert {name: str(field) for name, field in fields.items()} == {
        "angle": "an angle with period 360",
        "domain": "one of law, news",
        "embedding": "2 numbers",
        "label": "one of 1, 2",
        "rank": "a number from 8 to 16",
    }
    assert fields.table(conditions.values()).shape == (3, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network\na\n", "needs a header, a first column that names networks, and a column for each field"),
        ("n,x\na,1\na,2\n", "names 'a' more than once"),
        ("n,x\na,1\nb\n", "row 3 has 1 cells, and the header has 2"),
        ("n,x:angle\na,north\n", "column 'x:angle' of .* must hold numbers"),
        ("n,x:angel\na,1\n", "must be angle or category, got 'angel'"),
        ("n,x,y\na,,1\nb,,2\n", "column 'x' of .* is empty"),
        ("n,x\na,3\nb,3\n", "is 3 for all networks, which says nothing"),
        ('n,x\na,"[1]"\nb,"[1,2]"\n', r"holds lists of \[1, 2\] numbers"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(ConditionError, match=message):
        read_conditions(write(tmp_path, text))
