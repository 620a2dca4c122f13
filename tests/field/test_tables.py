"""Tables of conditions as programs and people write them: numbers, vectors and words in every form."""

import pandas as pd
import pytest

from pdiff_hf.models.condition import ConditionError, ScalarField, VectorField
from pdiff_hf.snapshots.conditions import read_conditions


def write(tmp_path, cells, title="rate"):
    rows = "".join('n{}.pt,"{}"\n'.format(i, cell.replace('"', '""')) for i, cell in enumerate(cells))
    (tmp_path / "t.csv").write_text(f"network,{title}\n{rows}", encoding="utf-8")
    return tmp_path / "t.csv"


NUMBERS = {
    "minus sign": (["−5", "3"], [-5, 3]),
    "NumPy": (["np.float64(0.5)", "np.float64(0.25)"], [0.5, 0.25]),
    "exponents": (["1e-3", "2E-3"], [0.001, 0.002]),
    "decimal comma": (["1,5", "-2,5"], [1.5, -2.5]),
}


@pytest.mark.parametrize(("cells", "expected"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_in_other_forms(cells, expected, tmp_path):
    found, fields = read_conditions(write(tmp_path, cells))
    assert isinstance(fields["rate"], ScalarField)
    assert [condition["rate"] for condition in found.values()] == expected


VECTORS = {
    "JAX": ["Array([1., 2.], dtype=float32)", "Array([1., 3.], dtype=float32)"],
    "list()": ["list([1, 2])", "list([1, 3])"],
    "torch": ["tensor([1., 2.], device='cuda:0')", "tensor([1., 3.], grad_fn=<AddBackward0>)"],
    "lines": ["[1.\n 2.]", "[1.\n 3.]"],
    "tuples": ["(1, 2)", "(1, 3)"],
}


@pytest.mark.parametrize("cells", VECTORS.values(), ids=VECTORS)
def test_vectors_as_they_were_printed(cells, tmp_path):
    found, fields = read_conditions(write(tmp_path, cells))
    assert isinstance(fields["rate"], VectorField)
    assert [condition["rate"] for condition in found.values()] == [[1, 2], [1, 3]]


ODD = {
    "units": ["5 ms", "10 ms"],
    "units without a space": ["7B", "13B"],
    "durations": ["1h", "30min"],
    "euros": ["5 €", "6 €"],
    "about": ["~3", "~4"],
    "bounds": ["<3", ">4"],
    "fractions": ["1/2", "3/4"],
    "errors": ["1±0.1", "2±0.1"],
    "hexadecimal": ["0x1F", "0x2A"],
    "Fortran": ["1d-3", "2d-3"],
    "powers": ["10⁻³", "10⁻²"],
    "products": ["1·10^-3", "2·10^-3"],
    "quotes": ["'0.5'", "'0.6'"],
    "an apostrophe for spreadsheets": ["'0.5", "'0.6"],
    "formulas": ["=1+1", "=2"],
    "complex": ["1+2j", "2+2j"],
    "brackets for minus": ["(5)", "(6)"],
    "dates": ["01/02/2024", "03/02/2024"],
    "intervals": ["(0, 1]", "(1, 2]"],
}


@pytest.mark.parametrize("cells", ODD.values(), ids=ODD)
def test_numbers_that_would_become_words(cells, tmp_path):
    with pytest.raises(ConditionError, match="column 'rate', row 2: .* is not a number;.*'rate:category' if it holds"):
        read_conditions(write(tmp_path, cells))
    _, fields = read_conditions(write(tmp_path, cells, "rate:category"))
    assert set(fields["rate"].choices) == set(cells)


@pytest.mark.parametrize("cells", [["{1, 2}", "{1, 3}"], ["{'a': 1}", "{'a': 2}"], ["tensor(0.5)", "tensor(0.6)"]])
def test_vectors_that_would_become_words(cells, tmp_path):
    with pytest.raises(ConditionError, match="row 2: .* is not a list of numbers"):
        read_conditions(write(tmp_path, cells))


@pytest.mark.parametrize("other", ["cat\u200b", "CAT", "c\N{FULLWIDTH LATIN SMALL LETTER A}t"])
def test_words_that_look_alike(other, tmp_path):
    with pytest.raises(ConditionError, match="row 3: .* differs from 'cat' .row 2. only in case or spaces"):
        read_conditions(write(tmp_path, ["cat", other, "dog"]))


def test_letters_put_together_in_two_ways(tmp_path):
    with pytest.raises(ConditionError, match="row 3: .* differs from"):
        read_conditions(write(tmp_path, ["café", "cafe\N{COMBINING ACUTE ACCENT}"]))


@pytest.mark.parametrize("index", [["1", "2"], ["x", "y"]])
def test_a_column_before_that_of_the_networks(index, tmp_path):
    frame = pd.DataFrame({"network": ["a.pt", "b.pt"], "rate": [1, 2]}, index=index)
    frame.to_csv(tmp_path / "t.csv")
    with pytest.raises(ConditionError, match="column 'network' names networks, and must be the first"):
        read_conditions(tmp_path / "t.csv")


def test_one_network_under_two_paths(tmp_path):
    (tmp_path / "t.csv").write_text("network,rate\na.pt,1\n./a.pt,2\n", encoding="utf-8")
    with pytest.raises(ConditionError, match="row 3: 'a.pt' is named more than once"):
        read_conditions(tmp_path / "t.csv")
