"""What the page shows of a generator whose networks are data."""

import re
import shutil
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")


@pytest.fixture(scope="module")
def data(data_run, tmp_path_factory):
    from pdiff_hf.scripts.fields_page import load_data

    folder = shutil.copytree(data_run.folder, tmp_path_factory.mktemp("page") / "run")
    pipeline = (folder / "pipeline").rename(folder / "aside")
    assert load_data(str(folder)) is None  # not yet
    pipeline.rename(folder / "pipeline")
    assert load_data(str(folder / "pipeline")) is None  # without its data
    assert load_data(str(folder)) is load_data(str(folder))
    return load_data(str(folder))


def test_data_of_a_class_at_any_resolution_beside_the_nearest(data):
    shown = data.draw("3", 1.5, 20, 0)
    assert len(re.findall("<img ", shown)) == 24 and "the training datum that is nearest" in shown
    assert data.draw("3", 1.5, 20, 0) == shown != data.draw("any", 1.5, 20, 0)
    assert data.words() == ("label", [str(digit) for digit in range(10)])


def test_the_page_says_what_is_generated(data_run):
    from pdiff_hf.scripts.explore import load_source
    from pdiff_hf.scripts.page import describe

    assert "parameters in 4 tensors of `NeuralField`" in describe(load_source(str(data_run.folder)))


def test_half_of_a_held_out_datum(data, monkeypatch):
    monkeypatch.setattr("pdiff_hf.scripts.fields_page.CANDIDATES", 50)
    shown = data.complete(3, "left half")
    assert "posterior mean" in shown and "nearest training datum" in shown


def test_the_tab_can_be_built():
    import gradio as gr

    from pdiff_hf.scripts.fields_page import data_tab

    with gr.Blocks() as page:
        name, about = gr.Textbox(), gr.Markdown()
        with gr.Tabs() as tabs:
            data_tab(name, about, tabs)
    assert len(page.fns) == 3
