"""scripts/app.py, in a headless browser: sampling, what is shown, downloads, errors, and both widths."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.pipelines import make_network, make_pipeline
from support.recipes import TINY_FAMILY
from support.runs import finish

from pdiff_hf import PDiffPipeline
from pdiff_hf.hub.push import push_run_to_hub
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.scripts import explore, on_demand

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")]
CHROMIUM = shutil.which("chromium")
SCRIPT = str(Path(__file__).parents[2] / "scripts" / "app.py")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
TIMEOUT = 300_000  # milliseconds: what is waited for comes at last on a machine of any speed


@pytest.fixture(scope="module")
def address():
    """Of the page, served by a process of its own, which opens with no generator."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, SCRIPT, "--port", str(port)]
    process = subprocess.Popen(argv, env=os.environ | {"NO_PROXY": "127.0.0.1,localhost"})
    try:
        for _ in range(10 * TIMEOUT // 1000):
            assert process.poll() is None, "the app has ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, browser, address):
    """An open page; none of its requests leaves this machine, and it fits the screen."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, is_mobile=request.param == "phone", accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)
    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def open_generator(page, source) -> None:
    page.get_by_label("Generator").fill(str(source))
    page.get_by_role("button", name="Open").click()


def show_tab(page, name) -> None:
    tab = page.get_by_role("tab", name=name)
    tab.wait_for()  # all fit a phone; none hides behind a button
    tab.click()


def open_settings(page) -> None:
    page.get_by_role("button", name="Expert settings").click()
    page.get_by_label("Scheduler").wait_for()


def has_picture(page) -> bool:
    image = page.locator("img:visible").first
    image.wait_for()
    return image.evaluate("image => image.decode().then(() => image.naturalWidth > 100)")


def wait_for_networks(page, text) -> None:
    """An error on the page ends the wait; a failure says what stands there instead."""
    done, error = page.get_by_text(text), page.locator(".toast-body")
    with contextlib.suppress(Exception):
        done.or_(error).first.wait_for()
    assert done.is_visible(), page.locator("body").inner_text()


def eventually(page, check) -> None:
    """A browser changes one component after the other: some may be those of the settings before."""
    for _ in range(TIMEOUT // 100):
        with contextlib.suppress(AssertionError):
            return check()
        page.wait_for_timeout(100)
    check()


def sample(page, **settings) -> None:
    fields = {page.get_by_label(label.replace("_", " ")): value for label, value in settings.items()}
    while any(field.input_value() != value for field, value in fields.items()):
        for field, value in fields.items():
            field.fill(value)
        page.wait_for_timeout(500)  # a page that is still at work on what it has opened may set them again
    page.get_by_role("button", name="Sample").click()


def download_networks(page, folder) -> None:
    with page.expect_download() as download:
        page.get_by_text("Download networks (").click()
    folder.mkdir(exist_ok=True)
    download.value.save_as(folder / "networks.zip")
    with zipfile.ZipFile(folder / "networks.zip") as archive:
        archive.extractall(folder)


def test_a_run_is_sampled_compared_and_downloaded(digits_run, page, tmp_path):
    page.get_by_text("Open a generator first.").wait_for()
    open_generator(page, digits_run.folder)
    page.get_by_text("in 4 tensors of test_resnet trained on digits").wait_for()
    page.get_by_text("Accuracy on 100 test examples").wait_for()
    assert page.locator(".at-work figure img").count() == on_demand.PICTURES
    assert page.locator(".at-work .row").count() == 3  # generated, snapshots, base model
    assert page.get_by_text("Not available:").count() == 0
    results, settings = page.get_by_role("tab", name="Accuracy"), page.get_by_label("number input for Networks")
    assert page.viewport_size["width"] > 400 or results.bounding_box()["y"] < settings.bounding_box()["y"]
    show_tab(page, "Accuracy")
    page.get_by_text("The 6 networks of the report on 100 test examples.").wait_for()
    assert has_picture(page)
    open_settings(page)
    how = {"number_input_for_Denoising_steps": "5", "number_input_for_Temperature": "0.5", "Seed": "3"}
    sample(page, number_input_for_Networks="7", **how)
    wait_for_networks(page, "Done: 7 networks in 5 steps, seed 3.")
    page.get_by_text("7 networks sampled here:").wait_for()
    assert has_picture(page)
    show_tab(page, "Process")
    page.locator("img:visible").nth(1).wait_for()  # distance and accuracy along the way
    show_tab(page, "Parameters")
    assert has_picture(page)
    show_tab(page, "Report")
    page.get_by_text("Against the snapshots:").wait_for()
    page.get_by_role("cell", name="snapshots").first.wait_for()
    table = page.locator(".report table")
    assert table.evaluate("t => [...t.rows].every(r => r.getBoundingClientRect().right <= innerWidth)")  # none cut off

    pipe = digits_run.pipeline
    expected = pipe(7, 5, torch.Generator().manual_seed(3), temperature=0.5, output_type="pt").parameters
    download_networks(page, tmp_path)
    got = [load_file(tmp_path / f"network-{i:05d}.safetensors") for i in range(7)]
    rows = torch.stack([pipe.autoencoder.layout.flatten(tensors) for tensors in got])
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)

    page.get_by_label("Whole networks").check()  # of the same networks, which are not sampled again
    page.get_by_role("button", name="How to load them").click()
    page.get_by_text('from_pretrained("network-00000")').wait_for()
    download_networks(page, tmp_path / "whole")
    _, code, _ = (tmp_path / "whole" / "README.md").read_text().split("```")
    loaded = run_code(code.removeprefix("python"), tmp_path / "whole")
    for name, tensor in pipe.make_model(pipe.autoencoder.layout.unflatten(expected[0])).state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.cpu(), atol=1e-5, rtol=1e-5)


def run_code(code, folder):
    """The `network` that code makes in a folder."""
    variables: dict = {}
    with contextlib.chdir(folder):
        exec(code, variables)
    return variables["network"]


@pytest.fixture(scope="module")
def moved(family_run, tmp_path_factory) -> Path:
    """A finished run for a family, which is not where its recipe says."""
    return shutil.copytree(family_run.folder, tmp_path_factory.mktemp("family") / "moved")


def test_the_network_at_work_follows_the_controls(moved, page, tmp_path):
    open_generator(page, moved)
    page.get_by_text("angle 36, invert no, occlude none", exact=True).wait_for()
    assert page.get_by_text("Not available:").count() == 0
    assert page.locator(".at-work figure").count() == on_demand.PICTURES
    page.get_by_label("number input for angle").fill("100")
    page.get_by_role("combobox", name="invert").click()
    page.get_by_role("option", name="yes").click()
    page.get_by_text("angle 100, invert yes, occlude none", exact=True).wait_for()
    page.get_by_role("slider", name="angle").press("ArrowRight")
    page.get_by_text("angle 101, invert yes, occlude none", exact=True).wait_for()
    page.locator(".at-work .row").nth(1).get_by_text("%").wait_for()  # trained while the page is read

    source = explore.load_source(str(moved))
    task = {"angle": 101.0, "invert": "yes", "occlude": "none"}
    rows = source.pipe(1, 4, torch.Generator().manual_seed(0), condition=task, output_type="pt").parameters
    choice = on_demand.Choice(task, tuple(task))
    source.at_work.train(choice)
    figures, bars = source.at_work.show(choice, rows[0], True)
    names = ["generated", on_demand.TRAINED, "nearest snapshot", "base model"]
    wanted = list(zip(names, re.findall(r"<span>([\d.]+) %</span>", bars), strict=True))
    captions = [text.replace("<br>", "\n") for text in re.findall(r"<figcaption>(.*?)</figcaption>", figures)]

    def is_shown():
        shown = page.locator(".at-work .row").all_inner_texts()
        assert [(text.split("\n")[0], text.split()[-2]) for text in shown] == wanted
        assert [text.strip() for text in page.locator(".at-work figcaption").all_inner_texts()] == captions

    eventually(page, is_shown)

    page.locator("#told-occlude input").uncheck()
    page.get_by_text("The generator samples occlude from the seen tasks").wait_for()
    open_settings(page)
    sample(page, number_input_for_Networks="3", Seed="2")
    wait_for_networks(page, "Done: 3 networks for angle 101, invert yes in 4 steps")
    download_networks(page, tmp_path)
    told = {"angle": 101.0, "invert": "yes"}
    expected = source.pipe(3, 4, torch.Generator().manual_seed(2), condition=told, output_type="pt").parameters
    got = [load_file(tmp_path / f"network-{i:05d}.safetensors") for i in range(3)]
    rows = torch.stack([source.pipe.autoencoder.layout.flatten(tensors) for tensors in got])
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    assert 'condition = {"angle": 101, "invert": "yes"}' in (tmp_path / "README.md").read_text()
    show_tab(page, "Accuracy")
    text = page.get_by_text("3 networks sampled here for angle 101, invert yes, occlude none:").inner_text()
    scores = source.at_work.score(choice, rows).values
    assert f"accuracy {scores.mean():.2f} %" in text and "nearest snapshot" in text
    page.get_by_text("From the report: accuracy on tasks along").wait_for()
    assert has_picture(page)
    show_tab(page, "Process")
    page.locator("img:visible").nth(1).wait_for()
    show_tab(page, "Parameters")
    assert has_picture(page)
    show_tab(page, "Report")
    page.get_by_role("cell", name="kernel ridge", exact=True).wait_for()
    table = page.locator(".report table")
    assert table.evaluate("t => [...t.rows].every(r => r.getBoundingClientRect().right <= innerWidth)")

    open_generator(page, moved)  # again: the controls are as at first
    page.get_by_text("angle 36, invert no, occlude none", exact=True).wait_for()


def test_a_repository_shows_networks_at_work_too(moved, hub, page):
    push_run_to_hub(moved, "alice/on-demand")
    open_generator(page, "alice/on-demand")
    page.get_by_text("snapshots: they are not in the repository").wait_for()
    page.get_by_label("number input for angle").fill("100")
    page.get_by_text("angle 100, invert no, occlude none", exact=True).wait_for()
    page.locator(".at-work .row").nth(1).get_by_text("%").wait_for()
    assert page.locator(".at-work .row").count() == 3  # generated, trained on the task, base model
    sample(page, number_input_for_Networks="3")
    wait_for_networks(page, "Done: 3 networks for angle 100, invert no, occlude none in 4 steps")
    show_tab(page, "Accuracy")
    page.get_by_text("From the report: accuracy on tasks along").wait_for()


def test_a_repository_of_a_single_task(digits_run, hub, page):
    push_run_to_hub(digits_run.folder, "alice/explored")
    open_generator(page, "alice/explored")
    page.get_by_text("trained on digits").wait_for()
    page.get_by_text("snapshots: they are not in the repository").wait_for()
    page.locator(".at-work .row").nth(1).wait_for()
    assert page.locator(".at-work .row").count() == 2
    page.get_by_text("draws networks, compares them").wait_for()
    open_settings(page)
    page.get_by_label("number input for Denoising steps").fill("4")
    page.get_by_label("Scheduler").click()
    page.get_by_role("option", name="DDIM").click()
    page.get_by_role("button", name="Sample").click()
    wait_for_networks(page, "Done: 50 networks in 4 steps of DDIM, seed 0.")
    show_tab(page, "Parameters")
    assert has_picture(page)


FAMILY = """
from pdiff_hf import Fields, ImageFamily


class Darker(ImageFamily):
    fields = Fields({"gamma": {"type": "scalar", "low": 1.0, "high": 4.0}})

    def change(self, conditions, images, labels):
        return images ** conditions.over(images).gamma, labels
"""


def test_an_error_in_a_family_of_ones_own_is_a_message(page, tmp_path, monkeypatch):
    (tmp_path / "dark.py").write_text(FAMILY)
    changes = {"family": f"{tmp_path}/dark.py:Darker", "family_args": "{}", "output_dir": str(tmp_path / "out")}
    finish(PDiffConfig(**TINY_FAMILY | changes))
    trouble = (
        '        if (conditions.gamma > 3.9).any():\n            raise RuntimeError("too dark")\n        return images'
    )
    (tmp_path / "dark.py").write_text(FAMILY.replace("        return images", trouble))
    open_generator(page, tmp_path / "out")
    page.get_by_label("number input for gamma").fill("4")
    page.locator(".toast-body").get_by_text("too dark").wait_for()
    assert "dark.py, line 10: raise RuntimeError" in page.locator(".toast-body").inner_text()


def test_a_pipeline_without_a_report(page, tmp_path):
    make_pipeline(make_network()).save_pretrained(tmp_path / "alone")
    open_generator(page, tmp_path / "alone")
    page.get_by_text("its report: it has not been evaluated").wait_for()
    page.get_by_text("networks at work: there is no recipe.yaml").wait_for()
    open_settings(page)
    page.get_by_label("Scheduler").click()
    page.get_by_role("option", name="DDPM").click()
    page.get_by_label("number input for Networks").fill("500")
    page.get_by_label("number input for Denoising steps").fill("1000")
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("of 1000 …").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()


def test_errors_are_messages(page, tmp_path):
    for source, message in (
        (" ", "name a generator"),
        ("alice/nothing", "alice/nothing"),
        (tmp_path, "is neither the folder of a finished run or of a saved pipeline"),
        ("<img src=x>", "<img src=x>"),
    ):
        open_generator(page, source)
        toast = page.locator(".toast-body")
        toast.get_by_text(message).wait_for()
        assert "Traceback" not in toast.inner_text() and 'File "' not in toast.inner_text()
        toast.locator(".toast-close").click()
        toast.wait_for(state="detached")
    make_pipeline(make_network()).save_pretrained(tmp_path / "alone")
    open_generator(page, tmp_path / "alone")
    page.get_by_text("in 4 tensors").wait_for()
    open_settings(page)
    sample(page, Seed="")
    page.locator(".toast-body").get_by_text("must all be given").wait_for()


def test_a_space_reads_no_folders(tmp_path, monkeypatch):
    from pdiff_hf.scripts.page import build_app  # which needs gradio

    monkeypatch.setenv("SPACE_ID", "alice/space")
    with pytest.raises(ValueError, match="a Space reads no folders"):
        explore.load_source(str(tmp_path))
    assert build_app("alice/explored").title.startswith("pdiff_hf")


def test_what_is_sampled_at_once_is_bounded():
    source = explore.Source(make_pipeline(make_network()))
    most = explore.MAX_BYTES // (4 * source.pipe.autoencoder.layout.num_parameters)
    explore.check_size(source, most)
    with pytest.raises(ValueError, match=f"choose {most} at most"):
        explore.check_size(source, most + 1)
    with pytest.raises(ValueError, match="at most"):
        explore.check_size(source, most, whole=True)  # of which the generated tensors are a part


def test_a_report_of_another_version_is_left_out(tmp_path):
    make_pipeline(make_network()).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.json").write_text('{"groups": [{"name": "original"}]}')
    source = explore.load_source(str(tmp_path))
    assert source.report is None
    assert any("is a report of format 1" in text for text in source.missing)
    assert explore.compare(source, on_demand.Choice(), tmp_path / "a.png") == "There is nothing to compare yet."
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", list(explore.SCHEDULERS))
def test_schedulers_are_of_the_pipelines_own_diffusion(name):
    pipe: PDiffPipeline = make_pipeline(make_network())
    source = explore.Source(pipe)
    scheduler = explore.with_scheduler(source, name).scheduler
    for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"):
        assert scheduler.config[key] == pipe.scheduler.config[key]
    assert scheduler.config.get("timestep_spacing") == "trailing"
    *_, (step, latents) = explore.sample_latents(source, 3, 6, 1.0, name, seed=1)
    assert step == 6
    pipe.scheduler = scheduler
    expected = pipe(3, 6, torch.Generator().manual_seed(1), output_type="latent").parameters
    torch.testing.assert_close(latents.cpu(), expected, atol=1e-5, rtol=1e-5)
