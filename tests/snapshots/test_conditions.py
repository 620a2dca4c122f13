"""Conditions of networks from elsewhere: from a table, from recorded runs, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.blobs import Net
from support.scripts import run_script
from support.texts import make_text_encoder
from torch import nn

from pdiff_hf import PDiffPipeline
from pdiff_hf.layout import LayoutError
from pdiff_hf.models import ConditionError
from pdiff_hf.models.condition import Fields
from pdiff_hf.models.embedded import TextField, load_encoder
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import SnapshotError, SnapshotRecorder, import_snapshots, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.conditions import read_conditions
from pdiff_hf.snapshots.dataset import SnapshotWriter, condition_columns, load_fields


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
        "rank": "a number from 8 to 16",
        "domain": "one of law, news",
        "label": "one of 1, 2",
        "embedding": "2 numbers",
    }
    assert list(fields) == ["angle", "rank", "domain", "label", "embedding"]
    assert fields.table(conditions.values()).shape == (3, 6)


def column(tmp_path, cells, title="x"):
    rows = "".join('n{}.pt,"{}"\n'.format(i, cell.replace('"', '""')) for i, cell in enumerate(cells))
    return write(tmp_path, f"network,{title}\n{rows}")


NUMBERS = {
    ".5": ([".25", ".5", "1"], [0.25, 0.5, 1]),
    "1.": (["1.", "2.", "3.5"], [1, 2, 3.5]),
    "+1": (["+1", "-1", "−2"], [1, -1, -2]),
    "1e-3": (["1e-3", "1E5", "0"], [0.001, 1e5, 0]),
    "1,5": (["1,5", "-0,25", "3,125"], [1.5, -0.25, 3.125]),
    "0,125": (["0,125", "0,250", "1"], [0.125, 0.25, 1]),
    "NumPy": (["np.float64(0.5)", "np.float64(0.25)"], [0.5, 0.25]),
}


@pytest.mark.parametrize(("cells", "expected"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_as_other_programs_write_them(tmp_path, cells, expected):
    conditions, fields = read_conditions(column(tmp_path, cells))
    values = [row["x"] for row in conditions.values()]
    assert values == expected
    assert fields.to_dict() == {"x": {"type": "scalar", "low": min(values), "high": max(values)}}


@pytest.mark.parametrize("mark", ["", "NA", "n/a", "nan", "NaN", "None", "null", "<NA>", "#N/A"])
def test_missing_numbers_are_unknown(tmp_path, mark):
    conditions, fields = read_conditions(write(tmp_path, f"file,x,v\na,0.1,[1]\nb,{mark},{mark}\nc,0.3,[2]\n"))
    assert conditions["b"] == {"x": None, "v": None}
    assert fields.table(conditions.values()).isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


VECTORS = [
    "[0.5, 0.25]",
    "[0.5 0.25]",
    "[ 0.5\n  0.25 ]",
    "(0.5, 0.25)",
    "array([0.5, 0.25])",
    "np.array([0.5, 0.25])",
    "array([0.5 , 0.25], dtype=float32)",
    "Array([0.5, 0.25], dtype=float32)",
    "list([0.5, 0.25])",
    "[np.float64(0.5), np.float64(0.25)]",
    "tensor([0.5000, 0.2500])",
    "tensor([0.5000, 0.2500], device='cuda:0', dtype=torch.float64)",
    "tensor([0.5000, 0.2500], grad_fn=<SelectBackward0>)",
]


@pytest.mark.parametrize("cell", VECTORS)
def test_vectors_as_other_programs_print_them(tmp_path, cell):
    conditions, fields = read_conditions(write(tmp_path, f'file,v\na,"{cell}"\nb,"[1, 2]"\n'))
    assert conditions["a"]["v"] == [0.5, 0.25] and fields["v"].width == 2


ODD = """5 ms|10 ms; 7B|13B; 1h|30min; 5 €|6 €; ~3|~4; <3|>4; 1/2|3/4; 1±0.1|2±0.1; 0x1F|0x2A; 1d-3|2d-3; 10⁻³|10⁻²;
1·10^-3|2·10^-3; '0.5'|'0.6'; '0.5|'0.6; =1+1|=2; 1+2j|2+2j; (5)|(6); 01/02/2024|03/02/2024; (0, 1]|(1, 2]"""


@pytest.mark.parametrize("cells", ODD.replace("\n", " ").split("; "))
def test_numbers_that_would_become_words(cells, tmp_path):
    cells = cells.split("|")
    with pytest.raises(ConditionError, match="column 'x', row 2: .* is not a number;.*'x:category' if it holds"):
        read_conditions(column(tmp_path, cells))
    _, fields = read_conditions(column(tmp_path, cells, "x:category"))
    assert set(fields["x"].choices) == set(cells)


@pytest.mark.parametrize("cells", [["{1, 2}", "{1, 3}"], ["{'a': 1}", "{'a': 2}"], ["tensor(0.5)", "tensor(0.6)"]])
def test_vectors_that_would_become_words(cells, tmp_path):
    with pytest.raises(ConditionError, match="row 2: .* is not a list of numbers"):
        read_conditions(column(tmp_path, cells))


# With a space of no width, a letter of full width, and one that is put together.
ALIKE = {"cat": ["cat\u200b", "CAT", "c\uff41t"], "café": ["cafe\u0301"]}


@pytest.mark.parametrize(("word", "other"), [(word, other) for word, others in ALIKE.items() for other in others])
def test_words_that_look_alike(word, other, tmp_path):
    with pytest.raises(ConditionError, match=f"row 3: .* differs from '{word}' .row 2. only in case or spaces"):
        read_conditions(column(tmp_path, [word, other, "dog"]))


@pytest.mark.parametrize(
    "text",
    [
        "file,x,word\na,1,new\nb,2.5,old\n",
        "file;x;word\na;1;new\nb;2,5;old\n",
        "file\tx\tword\na\t1\tnew\n\nb\t2.5\told\n",
        "file|x|word\r\na|1|new\r\nb|2.5|old\r\n",
        "\ufefffile, x, word\na, 1, new \nb, 2.5, old\n",
        "file,x,word,\na,1,new,\nb,2.5,old,\n,,,\n",
        ",file,x,word\n0,a,1,new\n1,b,2.5,old\n",
    ],
)
def test_delimiters_are_found(tmp_path, text):
    conditions, _ = read_conditions(write(tmp_path, text))
    assert conditions == {"a": {"x": 1.0, "word": "new"}, "b": {"x": 2.5, "word": "old"}}


def test_other_encodings_of_a_file(tmp_path):
    (tmp_path / "table.csv").write_bytes("file,x\na,grün\nb,blau\n".encode("latin-1"))
    with pytest.raises(ConditionError, match="is not in UTF-8 .* save it as CSV UTF-8"):
        read_conditions(tmp_path / "table.csv")


def test_words_that_look_like_missing_values_are_kept_where_asked_for(tmp_path):
    conditions, fields = read_conditions(write(tmp_path, "file,region:category\na,NA\nb,EU\nc,\nd,Eu\n"))
    assert [row["region"] for row in conditions.values()] == ["NA", "EU", None, "Eu"]
    assert fields["region"].values == ("EU", "Eu", "NA")


def test_descriptions_in_words(tmp_path):
    encoder = make_text_encoder(tmp_path / "encoder")
    rows = ['a,1,"[""about law"", ""questions on law""]"', "b,2,about chess", "b,2,chess", "c,,", "d,2,[law] texts"]
    table = write(tmp_path, "network,rank,what:text\n" + "\n".join(rows) + "\n")
    conditions, fields = read_conditions(table, text_encoder=encoder)
    said = {name: condition["what"] for name, condition in conditions.items()}
    lists = {"a": ["about law", "questions on law"], "b": ["about chess", "chess"], "c": None, "d": ["[law] texts"]}
    assert said == lists and fields["what"] == TextField(encoder=encoder)
    assert read_conditions(table, fields)[0] == conditions
    with pytest.raises(ConditionError, match="row 3: 'a' has another 'rank' than before .2.0, 1.0.; only its desc"):
        read_conditions(write(tmp_path, "network,rank,what:text\na,1,law\na,2,on law\n"), text_encoder=encoder)
    with pytest.raises(ConditionError, match=r"column 'what:text', row 2: '\[1, 2\]' is not a list of texts"):
        read_conditions(write(tmp_path, 'network,what:text\na,"[1, 2]"\n'), text_encoder=encoder)

    network = Net()
    with SnapshotWriter(tmp_path / "data", LAYOUT, fields=fields) as writer:
        for name, condition in conditions.items():
            nn.init.normal_(network.head.weight)
            writer.write(LAYOUT.flatten(network.state_dict()), step=0, seed=0, condition=condition)
            assert name in "abcd"
    import_snapshots([tmp_path / "data"], LAYOUT, tmp_path / "copy")
    for folder in ("data", "copy"):
        dataset, _ = load_snapshots(tmp_path / folder)
        found = load_fields(tmp_path / folder)
        columns = condition_columns(dataset, found)
        assert [[part["text"] for part in row["what"]] if row["what"] else None for row in columns] == [*lists.values()]
        load_encoder.cache_clear()  # tables keep the embeddings
        (tmp_path / "encoder").rename(tmp_path / "away")
        expected = fields.alternatives(conditions.values())
        torch.testing.assert_close(found.alternatives(columns), expected, rtol=0, atol=0, equal_nan=True)
        (tmp_path / "away").rename(tmp_path / "encoder")


def test_what_was_understood_is_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        read_conditions(write(tmp_path, "file,x,word\na,1,new\nb,,old\nc,3,old\n"))
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("3 networks with their conditions are read from ")
    assert said.endswith("'x' is a number from 1 to 3, unknown for 1; 'word' is one of new, old")


def test_columns_of_known_fields(tmp_path):
    fields = Fields(
        {
            "x": {"type": "scalar", "low": 0.0, "high": 9.0},
            "word": {"type": "category", "values": ["new", "old"]},
            "v": {"type": "vector", "length": 2},
        }
    )
    conditions, same = read_conditions(write(tmp_path, 'file,word,x,v\na,old,3,"[1 2]"\nb,old,3,NA\n'), fields)
    assert same is fields
    assert conditions == {"a": {"word": "old", "x": 3.0, "v": [1.0, 2.0]}, "b": {"word": "old", "x": 3.0, "v": None}}
    with pytest.raises(ConditionError, match=r"column 'Word': there is no such field \(did you mean 'word'"):
        read_conditions(write(tmp_path, "file,Word\na,old\n"), fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network\na\n", "needs a header, a first column that names networks, and a column for each field"),
        ("n,x\na,1\na,2\n", "row 3: 'a' is named more than once"),
        ("n,x\na.pt,1\n./a.pt,2\n", "row 3: 'a.pt' is named more than once"),
        (",network,x\n1,a.pt,1\n2,b.pt,2\n", "column 'network' names networks, and must be the first"),
        (",network,x\nx,a.pt,1\ny,b.pt,2\n", "column 'network' names networks, and must be the first"),
        ("n,x\na,1\nb\n", "row 3 has 1 cells, and the header has 2"),
        ("", "is empty"),
        ("n;x,y;z\na;1,2;3\n", "can be read with commas and semicolons between its cells"),
        ("n,x:angle\na,north\n", "column 'x:angle', row 2: 'north' is not a number"),
        ("n,x:angel\na,1\n", "must be angle, category or text, got 'angel'"),
        ("n,x,y\na,,1\nb,,2\n", "column 'x': it is empty"),
        ("n,x\na,1\n,2\n", "row 3: the first column must name a network, and it is empty"),
        ("n,x,x\na,1,5\nb,2,6\n", "several columns of one name: 'x', 'x'"),
        ("n,x,X:category\na,1,5\nb,2,6\n", "several columns of one name: 'x', 'X'"),
        ("a.pt,1\nb.pt,2\n", "needs a header such as network,rate: its first row has 'a.pt' and '1'"),
        ("a,new\nb,old\nc,new\n", "needs a header .* its first row has 'a' and 'new'"),
        ("n,x\na,1\nb,inf\n", "column 'x', row 3: 'inf' is infinite or too large"),
        ("n,x\na,1\nb,1e400\n", "column 'x', row 3: '1e400' is infinite or too large"),
        ("n,x\na,1\nb,1" + "0" * 400 + "\n", "column 'x', row 3: '1000.* is infinite or too large"),
        ("n,x\na,16777216\nb,16777217\n", "column 'x': some of its numbers are equal in single precision"),
        ("n,x\na,1\nb,2\nc,unknown\n", "column 'x', row 4: 'unknown' is not a number; leave the cell empty"),
        ("n,x\na,5 %\nb,6 %\n", "column 'x', row 2: '5 %' is not a number"),
        ('n,x\na,"1,500"\nb,"2,250"\n', "row 2: '1,500' can have a decimal comma or thousands"),
        ("n,x\na,0.1 0.2\nb,0.3 0.4\n", "column 'x', row 2: '0.1 0.2' is not a number"),
        ("n,x\na,NA\nb,NaN\n", "column 'x'.* (no values|missing value)"),
        ("n,x\na,cat\nb,dog\nc,Cat \n", "column 'x', row 4: 'Cat' differs from 'cat' .row 2. only in case or spaces"),
        ("n,x\na,EU\nb,NA\n", "column 'x', row 3: 'NA' can be a missing value or a word"),
        ("n,x\na,new\nb,new\n", "column 'x': it is 'new' for all networks, which says nothing"),
        ("n,x:angle\na,3\nb,3\n", "column 'x:angle': it is 3.0 for all networks, which says nothing"),
        ('n,x\na,"[1, 2]"\nb,"[1, 2]"\n', r"it is \[1.0, 2.0\] for all networks, which says nothing"),
        ('n,x\na,"[0.1 0.2 ... 0.3]"\n', "row 2: .* is not a list of numbers .* it was shortened when it was printed"),
        ('n,x\na,"[1]"\nb,"[]"\n', r"row 3: '\[\]' is not a list of numbers"),
        ('n,x\na,"[1]"\nb,"[1e40]"\n', "row 3: .* infinite or too large"),
        ('n,x\na,"[1]"\nb,word\n', "row 3: 'word' is not a list of numbers"),
        ("n,x\na,word\nb,[1\n", r"row 2: 'word' is not a list of numbers"),
        ('n,x\na,"wo\nb,1\n', "unexpected end of data"),
        ("n,seed\na,1\nb,2\n", "column 'seed': a field cannot be called parameters, step, seed"),
        ("n,x\n" + "".join(f"a{i},w{i}\n" for i in range(30)), "has 30 different texts, such as 'w0'. .* 'x:text'"),
        ("n,x\na,is it good or bad\nb,is it long\n", "has 2 different texts, .* 'x:text' .* 'x:category'"),
        ("n,x\na,3\nb,3\n", "is 3.0 for all networks, which says nothing"),
        ('n,x\na,"[1]"\nb,"[1,2]"\n', r"it holds lists of \[1, 2\] numbers"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(ConditionError, match=message):
        read_conditions(write(tmp_path, text))


TOPICS = ["law", "chess", "cooking", "texts"]
ANGLES = {"angle": {"type": "angle"}}
LAYOUT = select_layout(Net(), "head")


def record(folder, condition, fields=ANGLES) -> None:
    network = Net()
    with SnapshotRecorder(network, folder, "head", condition=condition, fields=fields) as recorder:
        for step in (1, 2):
            nn.init.normal_(network.head.weight)
            recorder.snapshot(step)


def test_recorded_runs_are_imported_with_their_conditions(tmp_path):
    for i in range(2):
        record(tmp_path / f"run{i}", {"angle": 30.0 * i})
    import_snapshots([tmp_path / "run0", tmp_path / "run1"], LAYOUT, tmp_path / "all")
    dataset, layout = load_snapshots(tmp_path / "all")
    assert load_fields(tmp_path / "all").to_dict() == Fields(ANGLES).to_dict()
    assert [dataset[name][:] for name in ("angle", "step", "seed")] == [[0, 0, 30, 30], [1, 2, 1, 2], [0, 0, 1, 1]]
    runs = [parameter_matrix(*load_snapshots(tmp_path / f"run{i}")) for i in range(2)]
    assert torch.equal(parameter_matrix(dataset, layout), torch.cat(runs))


def test_recorders_and_imports_refuse_conditions_that_do_not_fit(tmp_path):
    with pytest.raises(ConditionError, match="needs fields="):
        record(tmp_path / "a", {"angle": 30.0}, fields=None)
    with pytest.raises(ConditionError, match="no field 'angel'"):
        record(tmp_path / "a", {"angel": 30.0})
    record(tmp_path / "a", {"angle": 30.0})
    record(tmp_path / "b", {"hue": 30.0}, fields={"hue": {"type": "angle"}})
    with pytest.raises(SnapshotError, match=r"'.*b': the conditions of the data set have the fields 'hue'"):
        import_snapshots([tmp_path / "a", tmp_path / "b"], LAYOUT, tmp_path / "all")
    with pytest.raises(LayoutError, match="other tensors"):
        import_snapshots([tmp_path / "a"], select_layout(Net(), "norm"), tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_generator_is_told_what_to_make_in_words(tmp_path, monkeypatch, caplog):
    encoder = make_text_encoder(tmp_path / "encoder")
    lines = ["network,what:text"]
    for i in range(8):
        save_file(Net().state_dict(), tmp_path / f"net-{i}.safetensors")
        texts = json.dumps([f"{kind} questions on {TOPICS[i % 4]}" for kind in ("answers", "the")])
        lines.append(f"""net-{i}.safetensors,"{texts.replace('"', '""')}\"""")
    table = write(tmp_path, "\n".join(lines) + "\n")
    out = tmp_path / "out"
    flags = ["--task", "support.blobs:Blobs", "--base_epochs", 0, "--select", "head", "--output_dir", out]
    flags += ["--latent_dim", 2]
    run_script(monkeypatch, "collect.py", *flags, "--conditions", table, "--text_encoder", encoder)
    stages = ["--stages", "autoencoder", "denoiser", "--autoencoder_steps", 2, "--denoiser_steps", 2]
    run_script(monkeypatch, "train.py", *flags, *stages)
    pipe = PDiffPipeline.from_pretrained(out)
    assert pipe.condition_encoder.fields["what"] == TextField(encoder=encoder)
    seen = pipe.condition_encoder.config.seen_texts["what"]["texts"]
    assert len(set(seen)) == 8 and "answers questions on law" in seen
    caplog.clear()
    sampled = [
        pipe(1, 2, torch.Generator().manual_seed(0), condition={"what": text}, output_type="pt").parameters
        for text in ("answers questions on law", ["answers questions on law"], "translates")
    ]
    assert torch.equal(sampled[0], sampled[1]) and sampled[0].isfinite().all()
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "collect.py", *flags, "--import", tmp_path, "--text_encoder", encoder)


def test_a_table_names_the_networks_that_collect_imports(tmp_path, monkeypatch):
    networks = [Net() for _ in range(3)]
    for i, network in enumerate(networks):
        save_file(network.state_dict(), tmp_path / f"net-{i}.safetensors")
    table = write(tmp_path, "network,angle:angle\nnet-2.safetensors,90\nnet-0.safetensors,\nnet-1.safetensors,10\n")
    flags = ["--task", "support.blobs:Blobs", "--base_epochs", 0, "--select", "head", "--latent_dim", 2]
    run_script(monkeypatch, "collect.py", *flags, "--conditions", table, "--output_dir", tmp_path / "out")
    dataset, layout = load_snapshots(tmp_path / "out" / "snapshots")
    assert dataset["angle"][:] == [90, None, 10] and dataset["step"][:] == [2, 0, 1]
    expected = torch.stack([LAYOUT.flatten(networks[i].state_dict()) for i in (2, 0, 1)])
    assert torch.equal(parameter_matrix(dataset, layout), expected)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "collect.py", *flags, "--conditions", table, "--import", tmp_path)
