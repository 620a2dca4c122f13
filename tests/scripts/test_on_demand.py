"""What the page says of a generator with conditions, against plain loops."""

import html
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from support.families import make_family, make_networks

from pdiff_hf.hub.card import make_model_card
from pdiff_hf.models import ConditionEncoder
from pdiff_hf.scripts import explore, on_demand
from pdiff_hf.utils.names import generator_folder
from pdiff_hf.utils.seeds import derive_seed


@pytest.fixture(scope="module")
def moved(family_run, tmp_path_factory) -> Path:
    """The folder of a finished run, which is not where its recipe says."""
    return shutil.copytree(family_run.folder, tmp_path_factory.mktemp("moved") / "renamed")


def all_told(**task) -> "on_demand.Choice":
    return on_demand.Choice(task, tuple(task))


def numbers(shown: str) -> list[float]:
    return [float(value) for value in re.findall(r"<span>([\d.]+) %</span>", shown)]


@torch.no_grad()
def test_what_is_shown_is_what_a_loop_over_images_finds(moved):
    source = explore.load_source(str(moved))
    assert source.missing == []
    choice = all_told(angle=100.0, invert="yes", occlude="left")
    generator = torch.Generator().manual_seed(5)
    (network,) = source.pipe(1, 4, generator, condition=choice.condition, output_type="model").parameters
    parameters = source.pipe(1, 4, generator.manual_seed(5), condition=choice.condition, output_type="pt").parameters
    *_, (_, latents) = explore.sample_latents(source, 1, 4, 1.0, "DPM-Solver++", 5, choice.condition)
    same = source.pipe.decode_latents(latents)
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
    shown, bars = source.at_work.show(choice, parameters[0])
    assert numbers(bars)[0] == pytest.approx(100 * right / 40, abs=0.05)
    chosen = torch.linspace(0, 39, on_demand.PICTURES).round().long().tolist()
    assert re.findall("<figcaption>(.*?)</figcaption>", shown) == [captions[i] for i in chosen]
    assert shown.count('class="wrong"') == sum(captions[i].startswith("✗") for i in chosen)
    base = numbers(bars)[-1]
    batch = split.__getitems__(list(range(40)))
    logits = source.pipe.base_model(batch["pixel_values"]).logits
    assert base == pytest.approx(100 * (logits.argmax(-1) == batch["labels"]).float().mean().item(), abs=0.05)


def test_readers_who_come_together_see_what_they_would_see_alone(moved):
    source, choice = explore.load_source(str(moved)), all_told(angle=100.0, invert="yes", occlude="left")
    at_work, parameters = source.at_work, source.at_work.snapshots[:2]
    alone = at_work.score(choice, parameters).values
    found, others = {}, []

    def come(model, args) -> None:
        """While the networks of one reader are in the place of the base model's tensors."""
        swapped = [value for name, value in model.named_parameters() if name in at_work.layout.names]
        if not others and torch._C._functorch.is_batchedtensor(swapped[0]):
            others.append(threading.Thread(target=lambda: found.update(at_work.others(choice), trained=None)))
            others.append(threading.Thread(target=lambda: (at_work.train(choice), found.update(train=True))))
            for thread in others:
                thread.start()
                thread.join(0.5)  # long enough to look at the base model, if nothing makes it wait

    hook = at_work.model.register_forward_pre_hook(come)
    together = at_work.score(choice, parameters).values
    hook.remove()
    assert len(others) == 2
    for thread in others:
        thread.join()
    torch.testing.assert_close(together, alone)
    assert found["train"] and found["base model"] == pytest.approx(at_work.others(choice)["base model"])


def test_the_nearest_seen_task_is_nearest_in_what_the_generator_is_told():
    family = make_family("transformed", ranges={"blur": None, "occlude": None})
    networks = make_networks(family)
    at_work = on_demand.AtWork(family, networks.model, networks.layout)
    choice = all_told(angle=350.0, invert="no")
    assert at_work.nearest(choice) is None and list(at_work.others(choice)) == ["base model"]
    seen = [{"angle": 10.0, "invert": "yes"}, {"angle": 10.0, "invert": "no"}, {"angle": 10.0, "invert": "no"}]
    seen += [{"angle": 200.0, "invert": "no"}]
    at_work.snapshots = torch.arange(4.0).unsqueeze(1).expand(-1, networks.layout.num_parameters)
    at_work.conditions = family.fields.table(seen)
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
    assert on_demand.read_choice(encoder, controls, [True] * 4) == first
    told = on_demand.read_choice(encoder, controls, [True, False, False, True])
    assert told.condition == {"angle": 36.0, "word": "a"} and told.task == first.task
    for values, message in (
        ([36.0, [], "1 2 3", "a"], "'text' must be 2 numbers"),
        ([36.0, [], "1 x", "a"], "'text' must be 2 numbers: could not convert"),
        ([None, [], "1 2", "a"], "'angle' must be an angle"),
        ([36.0, [], "1 2", "c"], "'word' must be one of a, b"),
    ):
        with pytest.raises(ValueError, match=message):
            on_demand.read_choice(encoder, values, [False] * 4)


def test_words_of_a_task_are_no_html():
    choice = on_demand.Choice({"word": "<b>&"}, ())
    assert "&lt;b&gt;&amp;" in on_demand.frame("", choice) and "<b>&" not in on_demand.frame("", choice)


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
    assert [text.partition(":")[0] for text in source.missing] == ["snapshots"]
    (run / "recipe.yaml").unlink()
    text = (moved / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("family: transformed", "family: gone.py:Family"))
    explore.load_source.cache_clear()
    source = explore.load_source(str(run))
    assert source.at_work is None and "gone.py" in source.missing[0]
    explore.write_zip(source, torch.zeros(1, source.pipe.autoencoder.layout.num_parameters), tmp_path / "a", False, {})
    *_, (_, latents) = explore.sample_latents(source, 2, 4, 0.5, seed=1, condition={"invert": "yes"})
    options = {"temperature": 0.5, "output_type": "latent"}
    expected = source.pipe(2, 4, torch.Generator().manual_seed(1), condition={"invert": "yes"}, **options)
    torch.testing.assert_close(latents, expected.parameters)


def test_a_conditional_report_is_shown_by_itself(moved, tmp_path):
    source = explore.load_source(str(moved))
    text = explore.compare(source, on_demand.Choice(), tmp_path / "a.png")
    assert text == "From the report: accuracy on tasks along *angle*; invert no, occlude none."
    assert (tmp_path / "a.png").stat().st_size > 10_000
    page_module = pytest.importorskip("pdiff_hf.scripts.page", reason="needs gradio")
    short, about = page_module.narrow_report(source.report)
    assert source.report.verdict[1] in short and "passes before" not in short and about


def test_page_report_and_card_give_the_same_numbers(moved, tmp_path):
    explore.load_source.cache_clear()
    source = explore.load_source(str(moved))
    report, at_work = source.report, source.at_work
    for i, condition in enumerate(report.conditions["test"]):
        choice = all_told(**condition)
        at_work.train(choice)  # at the rate that the report has chosen
        others = at_work.others(choice)
        assert len(others) == 3
        for name, value in others.items():
            assert value == pytest.approx(report.group(name).scores()[i], abs=1e-4), name
    check_tables(moved, report)


def test_of_a_single_task_too(digits_run, tmp_path):
    source = explore.load_source(str(digits_run.folder))
    others, report = source.at_work.others(on_demand.Choice()), source.report
    assert others["snapshots"] == pytest.approx(report.group("snapshots").mean())
    noise = torch.Generator().manual_seed(derive_seed(0, *b"generated"))
    parameters = source.pipe(report.num_generated, generator=noise, output_type="pt").parameters
    scores = source.at_work.score(on_demand.Choice(), parameters)
    assert scores.values.tolist() == pytest.approx(report.generated.scores())
    text = explore.compare(source, on_demand.Choice(), tmp_path / "a.png", scores)
    assert f"accuracy {report.generated.mean():.2f} % on average" in text
    assert f"snapshots {report.group('snapshots').mean():.2f} %" in text
    assert f"snapshot is {report.generated.measures['max_iou']:.3f} on average" in text
    check_tables(digits_run.folder, report)


def check_tables(run: Path, report) -> None:
    """The cells of the summary are those of the report in all its forms, of the card, and of the page."""
    card = str(make_model_card(generator_folder(run), "alice/it", run=run))
    texts = [(run / "evaluation" / f"report.{kind}").read_text() for kind in ("md", "html")] + [card]
    for row in report.summary["rows"]:
        for cell in row:
            assert all(cell in text or html.escape(cell) in text for text in texts), cell
    assert all(html.escape(line) in text or line in text for line in report.verdict for text in texts)
    page_module = pytest.importorskip("pdiff_hf.scripts.page", reason="needs gradio")
    short, _ = page_module.narrow_report(report)
    assert all(cell in short for row in report.summary["rows"] for cell in row[:2])
