"""What the page says of a generator with conditions, against plain loops."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.families import make_family, make_networks
from support.recipes import TINY_FAMILY

from pdiff_hf.models import ConditionEncoder
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.scripts import explore, on_demand

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "app.py")


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """The folder of a finished run, which is not where its recipe says."""
    folder = tmp_path_factory.mktemp("family")
    run = prepare(PDiffConfig(**TINY_FAMILY, output_dir=str(folder / "out")))
    execute(run)
    return (folder / "out").rename(folder / "renamed")


def all_told(**task) -> "on_demand.Choice":
    return on_demand.Choice(task, tuple(task))


def numbers(shown: str) -> list[float]:
    return [float(value) for value in re.findall(r"<span>([\d.]+) %</span>", shown)]


@torch.no_grad()
def test_what_is_shown_is_what_a_loop_over_images_finds(moved):
    source = explore.load_source(str(moved))
    assert source.missing == [] and source.num_steps == 4
    choice = all_told(angle=100.0, invert="yes", occlude="left")
    generator = torch.Generator().manual_seed(5)
    (network,) = source.pipe(1, 4, generator, condition=choice.condition, output_type="model").parameters
    parameters = source.pipe(1, 4, generator.manual_seed(5), condition=choice.condition, output_type="pt").parameters
    page = explore.with_scheduler(source, "DPM-Solver++")
    same = page(1, 4, generator.manual_seed(5), condition=choice.condition, output_type="pt").parameters
    torch.testing.assert_close(same, parameters)

    split = source.at_work.family.task(choice.task).load_split("test")
    names = source.pipe.base_model.config.id2label
    captions, right = [], 0
    for i in range(len(split)):
        batch = split.__getitems__([i])
        predicted, true = int(network(batch["pixel_values"]).logits.argmax()), int(batch["labels"])
        right += predicted == true
        captions.append(f"✓ {names[true]}" if predicted == true else f"✗ {names[predicted]}<br>is {names[true]}")
    assert 0 < right < len(split) == 40
    shown = source.at_work.show(choice, parameters[0])
    assert numbers(shown)[0] == pytest.approx(100 * right / 40, abs=0.05)
    chosen = torch.linspace(0, 39, on_demand.PICTURES).round().long().tolist()
    assert re.findall("<figcaption>(.*?)</figcaption>", shown) == [captions[i] for i in chosen]
    assert shown.count('class="wrong"') == sum(captions[i].startswith("✗") for i in chosen)
    base = numbers(shown)[1]
    batch = split.__getitems__(list(range(40)))
    logits = source.pipe.base_model(batch["pixel_values"]).logits
    assert base == pytest.approx(100 * (logits.argmax(-1) == batch["labels"]).float().mean().item(), abs=0.05)


def test_the_nearest_seen_task_is_nearest_in_what_the_generator_is_told():
    family = make_family("transformed", ranges={"blur": None, "occlude": None})
    networks = make_networks(family)
    at_work = on_demand.AtWork(family, networks.model, networks.layout)
    choice = all_told(angle=350.0, invert="no")
    assert at_work.nearest(choice) is None and list(at_work.others(choice)) == ["base model"]
    seen = [{"angle": 10.0, "invert": "yes"}, {"angle": 10.0, "invert": "no"}, {"angle": 10.0, "invert": "no"}]
    seen += [{"angle": 200.0, "invert": "no"}, {"angle": None, "invert": "no"}]
    parameters = torch.arange(5.0).unsqueeze(1).expand(-1, networks.layout.num_parameters)
    at_work.set_snapshots(parameters, family.fields.table(seen))
    assert len(at_work.snapshots) == 4  # of the last one not all is known
    assert at_work.nearest(choice) == 2  # across the zero of angles; the last snapshot of that task
    assert at_work.nearest(on_demand.Choice({"angle": 11.0, "invert": "yes"}, ("angle",))) == 2
    assert at_work.nearest(on_demand.Choice({"angle": 199.0, "invert": "yes"}, ("angle",))) == 3
    assert at_work.nearest(on_demand.Choice({"angle": 199.0, "invert": "yes"}, ())) is None


def test_controls_are_the_inverse_of_values():
    fields = {
        "angle": {"type": "angle"},
        "bits": {"type": "vector", "length": 4},
        "text": {"type": "vector", "length": 2},
        "word": {"type": "category", "values": ["a", "b"]},
    }
    encoder = ConditionEncoder(fields)
    seen = {"angle": 3.0, "bits": [0, 1, 1, 0], "text": [0.5, -2.0], "word": "b"}
    encoder.remember(encoder.fields.table([seen]))
    first = on_demand.first_choice(encoder)
    assert first.task == {"angle": 36.0, "bits": [0, 1, 1, 0], "text": [0.5, -2.0], "word": "a"}
    controls = [on_demand.to_control(encoder, name, value) for name, value in first.task.items()]
    assert controls == [36.0, [1, 2], "0.5 -2", "a"]
    assert on_demand.read_choice(encoder, controls, list(fields)) == first
    told = on_demand.read_choice(encoder, controls, ["word", "angle"])
    assert told.condition == {"angle": 36.0, "word": "a"} and told.task == first.task
    for values, message in (
        ([36.0, [], "1 2 3", "a"], "'text' must be 2 numbers"),
        ([36.0, [], "1 x", "a"], "'text' must be 2 numbers: could not convert"),
        ([None, [], "1 2", "a"], "'angle' must be an angle"),
        ([36.0, [], "1 2", "c"], "'word' must be one of a, b"),
    ):
        with pytest.raises(ValueError, match=message):
            on_demand.read_choice(encoder, values, [])


def test_words_of_a_task_are_no_html():
    choice = on_demand.Choice({"word": "<b>&"}, ())
    assert "&lt;b&gt;&amp;" in on_demand.frame(choice, "") and "<b>&" not in on_demand.frame(choice, "")


def test_without_data_the_networks_are_still_there(moved, tmp_path):
    """A folder with nothing but the generator, a run whose data are gone, and one without its snapshots."""
    alone = explore.load_source(str(moved / "tuned"))
    assert alone.at_work is not None  # the run is around it
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tuned", "stages", "recipe.yaml", "evaluation"):
        (run / name).symlink_to(moved / name)
    source = explore.load_source(str(run))
    assert source.at_work is not None and source.snapshots is None
    assert [text.partition(":")[0] for text in source.missing] == ["the networks of seen tasks"]
    (run / "recipe.yaml").unlink()
    text = (moved / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("family: transformed", "family: gone.py:Family"))
    explore.load_source.cache_clear()
    source = explore.load_source(str(run))
    assert source.at_work is None and source.scorer is None and "gone.py" in source.missing[0]
    explore.write_zip(source, torch.zeros(1, source.pipe.autoencoder.layout.num_parameters), tmp_path / "a", False, {})
    *_, (_, latents) = explore.sample_latents(source, 2, 4, "DPM-Solver++", 1, {"invert": "yes"})
    expected = source.pipe(2, 4, torch.Generator().manual_seed(1), condition={"invert": "yes"}, output_type="latent")
    torch.testing.assert_close(latents, expected.parameters)


def test_a_conditional_report_is_shown_by_itself(moved, tmp_path):
    source = explore.load_source(str(moved))
    text = explore.compare(source, tmp_path / "a.png")
    assert text == "From the report: accuracy on tasks along *angle*; invert no, occlude none."
    assert (tmp_path / "a.png").stat().st_size > 10_000
    page_module = pytest.importorskip("pdiff_hf.scripts.page", reason="needs gradio")
    short, about = page_module.narrow_report(source.report)
    assert source.report.verdict[1] in short and "passes before" not in short and about


def test_help_does_not_wait_for_gradio():
    code = "import sys, runpy; sys.argv = ['app.py', '--help']\n"
    code += f"try: runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    code += "finally: print(sorted({'gradio', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "usage: app.py" in done.stdout and done.stdout.rstrip().endswith("[]"), done
