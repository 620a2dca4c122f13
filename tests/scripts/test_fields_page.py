"""What the page shows of a generator whose networks are data."""

import re
from importlib.util import find_spec

import pytest
from support.recipes import TINY_DATA

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import execute, prepare

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from pdiff_hf.scripts.fields_page import load_data

    run = prepare(PDiffConfig(**TINY_DATA, output_dir=str(tmp_path_factory.mktemp("page") / "run")))
    execute(run, ["base", "collect", "autoencoder"])
    assert load_data(str(run.folder)) is None  # not yet
    execute(run, ["denoiser"])
    assert load_data(str(run.folder / "pipeline")) is None  # without its data
    assert load_data(str(run.folder)) is load_data(str(run.folder))
    return load_data(str(run.folder))


def test_data_of_a_class_at_any_resolution_beside_the_nearest(data):
    shown = data.draw("3", 1.5, 20, 0)
    assert len(re.findall("<img ", shown)) == 24 and shown.count("generated, nearest") == 12
    assert data.draw("3", 1.5, 20, 0) == shown != data.draw("any", 1.5, 20, 0)
    assert data.words() == ("label", [str(digit) for digit in range(10)])


def test_half_of_a_held_out_datum(data, monkeypatch):
    monkeypatch.setattr("pdiff_hf.scripts.fields_page.CANDIDATES", 50)
    shown = data.complete(3, "left half")
    assert "posterior mean" in shown and "nearest training datum" in shown


def test_the_tab_can_be_built():
    import gradio as gr

    from pdiff_hf.scripts.fields_page import data_tab

    with gr.Blocks() as page:
        name, about = gr.Textbox(), gr.Markdown()
        with gr.Tabs():
            data_tab(name, about)
    assert len(page.fns) == 3
