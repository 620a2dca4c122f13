"""The page of `scripts/app.py`: what is on it, and what happens when it is used."""

import contextlib
import html
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from pdiff_hf.evaluation.render import table
from pdiff_hf.evaluation.report import Report
from pdiff_hf.models.condition import Field
from pdiff_hf.run.terminal import KNOWN
from pdiff_hf.scripts import explore, on_demand
from pdiff_hf.scripts.fields_page import data_tab
from pdiff_hf.scripts.watch import WATCHED, WATCHED_EXAMPLES, Watcher, draw_heat_map
from pdiff_hf.tasks.label_groups import LabelGroups
from pdiff_hf.utils.errors import users_line
from pdiff_hf.utils.terminal import shorten

MAX_MODELS, MAX_STEPS = 500, 1000
WATCHED_STEPS = 40  # of a longer process so many are drawn
SECONDS_A_PICTURE = 1.0  # drawing takes time that sampling needs
TRAINED_AT_ONCE = 10**8  # examples times parameters: a network that takes less to train is trained without being asked
TENSORS, WHOLE = "Generated tensors", "Whole networks"
# Columns of the summary that a phone has no room for.
NARROW = ("passes before", "passes a task", "size")
CSS = (
    """
.picture img { max-height: 58vh; object-fit: contain; padding-top: 30px; box-sizing: border-box; }
.report table { font-size: 0.85em; width: 100%; }
.report :is(th, td) { padding: 4px !important; white-space: normal !important; word-break: normal; }
.loading :is(pre, code) { white-space: pre-wrap !important; overflow-wrap: anywhere; }
@media (max-width: 640px) { .tab-container button { padding: 0 3px !important; font-size: 12px !important; } }
"""
    + on_demand.CSS
)
# Fonts of the reader's own machine: the page asks no other server for anything.
LAUNCH = {
    "theme": gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    "css": CSS,
    "footer_links": [],
    "ssr_mode": False,
}
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Errors as messages on the page, with the line of a file of the user's own; others also on the terminal."""
    try:
        yield
    except Exception as error:
        where = users_line(error)
        if not isinstance(error, KNOWN) and not where:
            logger.exception("the page met an error")
        # It stays until it is closed: nobody should have to read it in ten seconds.
        text = html.escape(shorten(f"{error or type(error).__name__}{where}"))
        raise gr.Error(text, print_exception=False, duration=None) from error


def describe(source: explore.Source) -> str:
    """Markdown: what the generator makes, from which data, and what is not available here."""
    layout, base_model = source.pipe.autoencoder.layout, source.pipe.base_model
    what = "a network that is not part of it"
    if base_model is not None:
        about = (
            getattr(base_model.config, name, None) for name in ("architecture", "model_type")
        )  # timm, transformers
        what = f"`{next(filter(None, about), type(base_model).__name__)}`"
    data = "" if source.dataset is None else f" trained on `{source.dataset}`"
    size = f"{layout.num_parameters:,} parameters in {len(layout.names)} tensors"
    return "\n\n".join(
        [
            f"**`{source.location}`** generates {size} of {what}{data}.",
            *(f"*Not available:* {text}." for text in source.missing),
        ]
    )


def narrow_report(report: Report | None) -> tuple[str, str]:
    """Verdict, warnings and the summary with the few columns that a phone has room for; and what explains them."""
    if report is None:
        return "There is no report.", ""
    summary = report.summary
    kept = [i for i, title in enumerate(summary["header"]) if title not in NARROW]
    rows = [[row[i] for i in kept] for row in summary["rows"]]
    parts = ["\n".join(f"- {line}" for line in report.verdict)]
    parts += [f"> **Warning:** {warning}" for warning in report.warnings]
    return "\n\n".join([*parts, table([summary["header"][i] for i in kept], rows)]), summary["about"]


def make_control(source: explore.Source, name: str, value: Any) -> Component:
    """For the value of a field."""
    encoder = source.pipe.condition_encoder
    field: Field = encoder.fields[name]
    value, look = on_demand.to_control(encoder, name, value), {"scale": 5, "min_width": 140, "interactive": True}
    if field.choices:
        return gr.Dropdown(list(field.choices), value=value, label=name, **look)
    if field.bounds:
        return gr.Slider(*field.bounds, value, step=field.step, label=name, **look)
    if not on_demand.bits_of(encoder, name):
        return gr.Textbox(value, label=f"{name} ({field})", max_lines=3, **look)
    family = source.at_work.family if source.at_work else None
    labels = family.base.class_names if isinstance(family, LabelGroups) else range(field.width)
    return gr.CheckboxGroup([(str(label), i) for i, label in enumerate(labels)], value=value, label=name, **look)


def show_network(source: explore.Source, choice: on_demand.Choice, train: bool, *settings: Any) -> tuple[str, str]:
    """The two parts of a network at work, above and below the controls."""
    if source.at_work is None:
        text = "There are no data here to show it at work. <i>Sample</i> gives networks all the same."
        return on_demand.frame(f'<p class="note">{text}</p>', choice), ""
    *_, (_, latents) = explore.sample_latents(source, 1, *settings, choice.told_or_none)
    above, below = source.at_work.show(choice, source.pipe.decode_latents(latents)[0], train)
    return on_demand.frame(above, choice), on_demand.frame(below)


def build_app(pipeline_id: str = "") -> gr.Blocks:
    """
    The page. It opens with the generator `pipeline_id`, if given: a Hub id, or the folder of a run or of a pipeline.
    The reader can choose another one; folders not in a Space.
    """
    latest = {}  # the choice of each reader, which moves on while a network is trained for the one before

    def open_generator(name):
        with messages(), tempfile.TemporaryDirectory() as folder:
            source = explore.load_source(name.strip())
            short_report, explanation = narrow_report(source.report)
            first, zoo = on_demand.first_choice(source.pipe.condition_encoder), source.at_work and source.at_work.zoo
            size, config = source.pipe.autoencoder.layout.num_parameters, source.pipe.config
            quickly = bool(zoo) and zoo.num_steps * zoo.batch_size * size <= TRAINED_AT_ONCE
            now = name.strip(), time.monotonic()  # a new one each time, so that the controls are made anew
            picture, latest[now] = Path(folder, "comparison.png"), first
            own = config.num_inference_steps, config.temperature, explore.AS_SAVED, 0
            shown = dict.fromkeys((accuracies, distances, heat), gr.Image(None, visible=False))
            shown |= dict(zip(settings, own, strict=True))
            shown |= dict(zip((above, below), show_network(source, first, quickly, *own), strict=True))
            yield shown | {
                about: describe(source),
                opened: now,
                choice: first,
                sampled: None,
                tabs: gr.Tabs(selected="work"),
                comparison_text: explore.compare(source, first, picture),
                comparison: gr.Image(picture if picture.exists() else None, visible=picture.exists()),
                report_text: short_report,
                report_more: gr.Accordion(visible=bool(explanation)),
                report_about: explanation,
                train: gr.Checkbox(quickly, visible=bool(zoo)),
                download: gr.DownloadButton("Download networks", None, interactive=False),
                kind: gr.Radio([TENSORS, WHOLE] if source.pipe.base_model is not None else [TENSORS], value=TENSORS),
                loading: explore.how_to_load(source, False, first.told_or_none),
                status: "**Sample** draws networks, compares them, and makes them ready for download.",
            }

    def choose(opened, train, *rest):
        with messages():
            source, own, values = explore.load_source(opened[0]), rest[: len(settings)], rest[len(settings) :]
            half = len(values) // 2
            latest[opened] = on_demand.read_choice(source.pipe.condition_encoder, values[half:], values[:half])
            return latest[opened], *show_network(source, latest[opened], train, *own)

    def show_again(opened, choice, train, *own):
        if opened is None or None in own:
            return gr.skip(), gr.skip()
        with messages():
            return show_network(explore.load_source(opened[0]), choice, train, *own)

    def train_one(opened, choice, train, *own):
        """Then the bar of a network that is trained on the task, unless the reader has moved on."""
        if not train or opened is None or latest.get(opened) != choice:
            return gr.skip()
        with messages():
            source = explore.load_source(opened[0])
            source.at_work.train(choice)
            return show_again(opened, choice, train, *own)[1] if latest[opened] == choice else gr.skip()

    def sample(num_models, num_steps, temperature, scheduler, seed, opened, choice):
        # All that is to be seen goes out each time, because a browser that falls behind leaves updates out.
        shown, numbers = {}, count()

        def draw(component, draw_to):
            # Each picture has a name of its own, because the browser shows an equal address from its cache.
            path = Path(folder, f"{next(numbers)}.png")
            text = draw_to(path)
            shown[component] = gr.Image(path if path.exists() else None, visible=path.exists())
            return text

        # Gradio has copies of all files when it asks for what follows.
        with messages(), tempfile.TemporaryDirectory() as folder:
            if opened is None:
                raise ValueError("open a generator first")
            source, how = explore.load_source(opened[0]), (num_steps, temperature, scheduler, seed)
            condition, at_work = choice.told_or_none, source.at_work
            explore.check_size(source, num_models or 0)
            yield {status: "Preparing …"}
            watcher = Watcher(source, choice)
            every, drawn = -(-(num_steps or 1) // WATCHED_STEPS), 0.0
            for step, latents in explore.sample_latents(source, num_models, *how, condition):
                if step % every and step < num_steps:
                    continue
                watcher.add(step, latents[:WATCHED])
                if step < num_steps and time.monotonic() - drawn < SECONDS_A_PICTURE:
                    continue
                draw(distances, watcher.draw_distances)
                if at_work is not None:
                    draw(accuracies, watcher.draw_accuracies)
                yield shown | {status: f"Step {step} of {num_steps} …"}
                drawn = time.monotonic()
            parameters = source.pipe.decode_latents(latents)
            draw(heat, partial(draw_heat_map, source, parameters))
            scored = 0
            while at_work is not None and scored < num_models:
                yield shown | {status: f"Scored {scored} of {num_models} networks …"}
                scored = min(max(explore.FIRST_SCORED, 2 * scored), num_models)
                scores = at_work.score(choice, parameters[:scored])  # those before may be kept
                compare = partial(explore.compare, source, choice, scores=scores)
                shown[comparison_text] = draw(comparison, compare)
            task = "" if condition is None else f" for {on_demand.in_words(condition)}"
            which = "" if scheduler == explore.AS_SAVED else f" of {scheduler}"
            steps = f"{num_steps} step{'s' if num_steps > 1 else ''}"
            shown[status] = f"Done: {num_models} networks{task} in {steps}{which}, seed {seed}."
            yield shown | {sampled: (opened[0], parameters, condition)}

    def pack(sampled, chosen):
        """What was sampled, in the form that is chosen."""
        if sampled is None:
            yield gr.skip(), gr.skip()
            return
        with messages(), tempfile.TemporaryDirectory() as folder:
            (name, parameters, condition), whole, archive = sampled, chosen == WHOLE, Path(folder, "networks.zip")
            source = explore.load_source(name)
            explore.check_size(source, len(parameters), whole)
            explore.write_zip(source, parameters, archive, whole, condition)
            label = f"Download networks ({archive.stat().st_size / 1e6:.1f} MB)"
            yield gr.DownloadButton(label, archive, interactive=True), explore.how_to_load(source, whole, condition)

    with gr.Blocks(title="pdiff_hf: generated networks", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown("## Generated networks")
        opened, choice, sampled = gr.State(None), gr.State(None), gr.State(None, time_to_live=3600)
        with gr.Row(equal_height=True):
            hint = "Hub id, or folder of a run or pipeline"
            name = gr.Textbox(pipeline_id, label="Generator", placeholder=hint, scale=5, max_lines=1)
            open_button = gr.Button("Open", scale=1, min_width=70)
        about = gr.Markdown()
        with gr.Row():
            # The results come first, so that a phone has them above the settings.
            with gr.Column(scale=3, min_width=300), gr.Tabs() as tabs:
                picture = {"show_label": False, "interactive": False, "buttons": ["download", "fullscreen"]}
                picture |= {"format": "png", "container": False, "visible": False, "elem_classes": "picture"}
                with gr.Tab("At work", id="work"):
                    above, controls = gr.HTML(), gr.Column()
                    train = gr.Checkbox(
                        label="Train a network on the task, to compare", visible=False, interactive=True
                    )
                    below = gr.HTML()
                data_tab(name, about, tabs)
                with gr.Tab("Accuracy"):
                    comparison_text = gr.Markdown()
                    comparison = gr.Image(**picture)
                with gr.Tab("Process"):
                    gr.Markdown(
                        f"The first {WATCHED} networks that you sample, as they are denoised: their distance from the "
                        f"snapshots' mean, and their accuracy on at most {WATCHED_EXAMPLES} test examples. It takes "
                        "two denoising steps at least, which are among the expert settings."
                    )
                    with gr.Row():
                        accuracies = gr.Image(min_width=280, **picture)
                        distances = gr.Image(min_width=280, **picture)
                with gr.Tab("Parameters"):
                    gr.Markdown(
                        "A row for each network that you sample: how far its parameters lie from the snapshots' mean."
                    )
                    heat = gr.Image(**picture)
                with gr.Tab("Report"):
                    report_text = gr.Markdown(elem_classes="report")
                    with gr.Accordion("What the columns mean", open=False, visible=False) as report_more:
                        report_about = gr.Markdown()
            with gr.Column(scale=1, min_width=280):
                num_models = gr.Slider(1, MAX_MODELS, 50, step=1, precision=0, label="Networks")
                with gr.Row():
                    sample_button = gr.Button("Sample", variant="primary", min_width=100, scale=2)
                    stop_button = gr.Button("Stop", min_width=70, scale=1)
                status = gr.Markdown("Open a generator first.")
                kind = gr.Radio([TENSORS, WHOLE], value=TENSORS, label="Download")
                download = gr.DownloadButton("Download networks", interactive=False)
                with gr.Accordion("How to load them", open=False):
                    loading = gr.Markdown(elem_classes="loading")
                with gr.Accordion("Expert settings", open=False):
                    num_steps = gr.Slider(1, MAX_STEPS, 20, step=1, precision=0, label="Denoising steps")
                    temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature")
                    scheduler = gr.Dropdown(list(explore.SCHEDULERS), value=explore.AS_SAVED, label="Scheduler")
                    seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")

        settings = [num_steps, temperature, scheduler, seed]
        changed = [about, comparison, comparison_text, report_text, report_more, report_about, accuracies, distances]
        changed += [heat, kind, download, loading, status, opened, choice, sampled, tabs, train, above, below]
        # Of moves that come while one is answered, the last one counts.
        last = {"trigger_mode": "always_last", "show_progress": "hidden"}
        state = [opened, choice, train, *settings]
        starts = [open_button.click, name.submit] + ([app.load] if pipeline_id else [])
        # Browsers change one after the other: settings first, so that none overwrites what a quick reader has entered.
        opening = gr.on(starts, open_generator, name, [*settings, *changed])
        moved = gr.on([box.input for box in (*settings, train)], show_again, state, [above, below], **last)
        for event in (opening, moved):
            event.success(train_one, state, below, **last)

        with controls:

            @gr.render(inputs=opened, triggers=[opened.change])
            def make_controls(now):
                source = explore.load_source(now[0])
                told, boxes, tick = [], [], {"scale": 1, "min_width": 76, "interactive": True}
                with gr.Row():
                    for name, value in on_demand.first_choice(source.pipe.condition_encoder).task.items():
                        with gr.Column(min_width=300), gr.Row():
                            boxes.append(make_control(source, name, value))
                            told.append(gr.Checkbox(True, label="told", elem_id=f"told-{name}", **tick))
                if boxes:
                    inputs = [opened, train, *settings, *told, *boxes]
                    moved = gr.on(
                        [box.input for box in (*boxes, *told)], choose, inputs, [choice, above, below], **last
                    )
                    moved.success(train_one, state, below, **last)

        shown = [status, distances, accuracies, comparison, comparison_text, heat, sampled]
        inputs = [num_models, *settings, opened, choice]
        sampling = sample_button.click(sample, inputs, shown, show_progress="hidden", concurrency_limit=1)
        sampling.success(pack, [sampled, kind], [download, loading], show_progress="hidden")
        kind.input(pack, [sampled, kind], [download, loading])
        stop_button.click(None, cancels=[sampling]).then(lambda: "Stopped.", None, status)
    return app
