"""The page of `scripts/app.py`: what is on it, and what happens when it is used."""

import html
import os
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.components import Component
from huggingface_hub.errors import HTTPError

from pdiff_hf.evaluation.render import table
from pdiff_hf.evaluation.report import Report
from pdiff_hf.models.condition import Field
from pdiff_hf.scripts import explore, on_demand
from pdiff_hf.scripts.fields_page import data_tab
from pdiff_hf.scripts.watch import WATCHED, WATCHED_EXAMPLES, Watcher, draw_heat_map
from pdiff_hf.tasks.label_groups import GroupedFamily

MAX_MODELS = 500
MAX_STEPS = 1000
WATCHED_STEPS = 40  # of a longer process so many are drawn
SECONDS_A_PICTURE = 1.0  # drawing takes time that sampling needs
TENSORS, WHOLE = "Generated tensors", "Whole networks"
# Columns of the summary that a phone has no room for.
NARROW = ("n", "best", "passes once", "passes before", "passes a task", "size")
ON_DEMAND = "on demand"
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


def _message(error: BaseException) -> gr.Error:
    # It stays until it is closed: nobody should have to read it in ten seconds.
    return gr.Error(html.escape(explore.one_line(error)), print_exception=False, duration=None)


def describe(name: str, source: explore.Source) -> str:
    """Markdown: what the generator makes, from which data, and what is not available here."""
    layout, base_model = source.pipe.autoencoder.layout, source.pipe.base_model
    what = "a network that is not part of it"
    if base_model is not None:
        what = f"`{getattr(base_model.config, 'architecture', base_model.config.model_type)}`"
    data = "" if source.dataset is None else f" trained on `{source.dataset}`"
    lines = [
        f"**`{name}`** generates {layout.num_parameters:,} parameters in {len(layout.names)} tensors of {what}{data}."
    ]
    lines += [f"*Not available:* {text}." for text in source.missing]
    return "\n\n".join(lines)


def announce(source: explore.Source) -> str:
    """Markdown: what sampling will show."""
    then = " then compared with the snapshots under *Accuracy*," if source.scorer else ""
    if source.pipe.condition_encoder is not None:
        then = " then scored under *Accuracy*," if source.at_work else then
        return (
            "Move a control to see the network for that task. **Sample** draws more networks for it. They form under "
            f"*Process*, are{then} drawn under *Parameters*, and can be downloaded."
        )
    return (
        f"**Sample** draws new networks. They form under *Process*, are{then} drawn under *Parameters*, and can be "
        "downloaded."
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
    value = on_demand.to_control(encoder, name, value)
    if field.choices:
        return gr.Dropdown(list(field.choices), value=value, label=name, interactive=True)
    if field.bounds:
        low, high = field.bounds
        return gr.Slider(low, high, value, step=field.step, label=name, interactive=True)
    if not on_demand.bits_of(encoder, name):
        return gr.Textbox(value, label=f"{name} ({field})", max_lines=3, interactive=True)
    family = source.at_work.family if source.at_work else None
    labels = family.base.class_names if isinstance(family, GroupedFamily) else range(field.width)
    bits = [(str(label), i) for i, label in enumerate(labels)]
    return gr.CheckboxGroup(bits, value=value, label=name, interactive=True)


def build_app(pipeline_id: str = "") -> gr.Blocks:
    """
    The page.

    Args:
        pipeline_id (`str`, *optional*): The generator that it opens with: a Hub id, the folder of a run or of a
            pipeline. The reader can choose another one; folders not in a Space.
    """

    def open_generator(name):
        try:
            source = explore.load_source(name.strip())
        except (ValueError, OSError, HTTPError) as error:
            raise _message(error) from error
        short_report, explanation = narrow_report(source.report)
        encoder = source.pipe.condition_encoder
        first = None if encoder is None else on_demand.first_choice(encoder)
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder, "accuracy_vs_similarity.png")
            text = explore.compare(source, picture)
            yield {
                about: describe(name.strip(), source),
                # A new one each time, so that the controls are made anew.
                opened: None if first is None else (name.strip(), time.monotonic()),
                choice: first,
                tabs: gr.Tabs(selected="accuracy" if first is None else ON_DEMAND),
                demand: gr.Tab(visible=first is not None),
                work: "" if first is None else work_html(source, first, source.num_steps, "DPM-Solver++", 0),
                comparison: gr.Image(picture if picture.exists() else None, visible=picture.exists()),
                comparison_text: text,
                report_text: short_report,
                report_more: gr.Accordion(visible=bool(explanation)),
                report_about: explanation,
                accuracies: gr.Image(None, visible=False),
                distances: gr.Image(None, visible=False),
                heat: gr.Image(None, visible=False),
                kind: gr.Radio(
                    [TENSORS, WHOLE] if source.has_whole_networks else [TENSORS], value=TENSORS, interactive=True
                ),
                download: gr.DownloadButton("Download networks", None, interactive=False),
                loading: explore.how_to_load(source, False, None if first is None else first.condition),
                status: announce(source),
            } | {num_steps: source.num_steps, scheduler: "DPM-Solver++", seed: 0}

    def work_html(source, choice, num_steps, scheduler, seed):
        if source.at_work is None:
            shown = (
                '<p class="note">There are no data here to show it at work; see above. <i>Sample</i> gives networks '
                "all the same.</p>"
            )
            return on_demand.frame(choice, shown)
        generator = torch.Generator().manual_seed(seed)
        pipe = explore.with_scheduler(source, scheduler)
        (parameters,) = pipe(1, num_steps, generator, condition=choice.condition, output_type="pt").parameters
        return on_demand.frame(choice, source.at_work.show(choice, parameters))

    def choose(opened, num_steps, scheduler, seed, told, *values):
        try:
            source = explore.load_source(opened[0])
            chosen = on_demand.read_choice(source.pipe.condition_encoder, values, told)
            return chosen, show_work(opened, chosen, num_steps, scheduler, seed)
        except (ValueError, OSError, HTTPError) as error:
            raise _message(error) from error

    def show_work(opened, choice, num_steps, scheduler, seed):
        if opened is None or None in (num_steps, seed):
            return gr.skip()
        try:
            return work_html(explore.load_source(opened[0]), choice, num_steps, scheduler, seed)
        except (ValueError, OSError, HTTPError) as error:
            raise _message(error) from error

    def sample(name, num_models, num_steps, scheduler, seed, chosen, opened, choice):
        # All that is to be seen goes out each time, because a browser that falls behind leaves updates out.
        shown = {}
        numbers = count()

        def draw(component, draw_to):
            # Each picture has a name of its own, because the browser shows an equal address from its cache.
            path = Path(folder, f"{next(numbers)}.png")
            text = draw_to(path)
            shown[component] = gr.Image(path, visible=True)
            return text

        # Gradio has copies of its own of all files when it asks for what follows.
        with tempfile.TemporaryDirectory() as folder:
            try:
                source = explore.load_source(name.strip())
                if None in (num_models, num_steps, seed):
                    raise ValueError("networks, steps and seed must all be given")
                whole = chosen == WHOLE
                condition, scorer, reference = None, source.scorer, None
                if source.pipe.condition_encoder is not None:
                    if opened is None or opened[0] != name.strip():
                        raise ValueError("open this generator first, and choose for which task it is to sample")
                    condition = choice.condition
                if source.at_work is not None:
                    scorer, reference = source.at_work.scorer(choice), source.at_work.reference(choice)
                elif scorer is not None:
                    reference = "snapshots", source.snapshot_scores
                explore.check_size(source, num_models)
                explore.check_size(source, num_models, whole)
                yield {status: "Preparing …"}
                watcher = Watcher(source, scorer, reference)
                every, drawn = -(-num_steps // WATCHED_STEPS), 0.0
                for step, latents in explore.sample_latents(source, num_models, num_steps, scheduler, seed, condition):
                    if step % every and step < num_steps:
                        continue
                    watcher.add(step, latents[:WATCHED])
                    if step < num_steps and time.monotonic() - drawn < SECONDS_A_PICTURE:
                        continue
                    draw(distances, watcher.draw_distances)
                    if scorer is not None:
                        draw(accuracies, watcher.draw_accuracies)
                    shown[status] = f"Step {step} of {num_steps} …"
                    yield shown
                    drawn = time.monotonic()
                parameters = source.pipe.decode_latents(latents)
                draw(heat, partial(draw_heat_map, source, parameters))
                scored = 0
                while scorer is not None and scored < num_models:
                    shown[status] = f"Scored {scored} of {num_models} networks …"
                    yield shown
                    scored = min(max(explore.FIRST_SCORED, 2 * scored), num_models)
                    scores = scorer.score("test", parameters[:scored])  # those before come from its cache
                    if source.at_work is not None:
                        texts = [on_demand.describe_scores(source.at_work, choice, scores)]
                        texts += [on_demand.about_field(source.report)] if explore.is_conditional(source) else []
                        shown[comparison_text] = "\n\n".join(texts)
                    else:
                        shown[comparison_text] = draw(comparison, partial(explore.compare, source, scores=scores))
                shown[status] = "Packing …"
                yield shown
                archive = Path(folder, "networks.zip")
                explore.write_zip(source, parameters, archive, whole, condition)
                label = f"Download networks ({archive.stat().st_size / 1e6:.1f} MB)"
                shown[download] = gr.DownloadButton(label, archive, interactive=True)
                shown[loading] = explore.how_to_load(source, whole, condition)
                task = "" if condition is None else f" for {on_demand.in_words(condition)}"
                shown[status] = f"Done: {num_models} networks{task} in {num_steps} steps of {scheduler}, seed {seed}."
                yield shown
            except (ValueError, OSError, HTTPError) as error:
                raise _message(error) from error

    with gr.Blocks(title="pdiff_hf: explore a generator", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown("## Explore a generator")
        opened, choice = gr.State(None), gr.State(None)
        with gr.Row(equal_height=True):
            name = gr.Textbox(
                pipeline_id,
                label="Generator",
                placeholder="Hub id, or folder of a run or pipeline",
                scale=5,
                max_lines=1,
            )
            open_button = gr.Button("Open", scale=1, min_width=70)
        about = gr.Markdown()
        with gr.Row(equal_height=True):
            sample_button = gr.Button("Sample", variant="primary", min_width=100, scale=2)
            stop_button = gr.Button("Stop", min_width=70, scale=1)
            with gr.Column(scale=7, min_width=280):
                status = gr.Markdown("Open a generator first.")
        with gr.Row():
            # The results come first, so that a phone has them above the settings.
            with gr.Column(scale=3, min_width=300), gr.Tabs() as tabs:
                picture = {"show_label": False, "interactive": False, "buttons": ["download", "fullscreen"]}
                picture |= {"format": "png", "container": False, "visible": False, "elem_classes": "picture"}
                with gr.Tab("On demand", id=ON_DEMAND, visible=False) as demand:
                    controls = gr.Column()
                    work = gr.HTML()
                data_tab(name, about)
                with gr.Tab("Accuracy", id="accuracy"):
                    comparison_text = gr.Markdown()
                    comparison = gr.Image(**picture)
                with gr.Tab("Process"):
                    gr.Markdown(
                        f"The first {WATCHED} networks that you sample, as they are denoised: how far they lie "
                        f"from the snapshots' mean, and, of a run, their accuracy on at most "
                        f"{WATCHED_EXAMPLES} test examples."
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
                    with gr.Accordion("What the columns say", open=False, visible=False) as report_more:
                        report_about = gr.Markdown()
            with gr.Column(scale=1, min_width=280):
                num_models = gr.Slider(1, MAX_MODELS, 50, step=1, precision=0, label="Networks")
                num_steps = gr.Slider(1, MAX_STEPS, 20, step=1, precision=0, label="Denoising steps")
                scheduler = gr.Dropdown(list(explore.SCHEDULERS), value="DPM-Solver++", label="Scheduler")
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
                kind = gr.Radio([TENSORS, WHOLE], value=TENSORS, label="Download (choose before you sample)")
                download = gr.DownloadButton("Download networks", interactive=False)
                with gr.Accordion("How to load them", open=False):
                    loading = gr.Markdown(elem_classes="loading")

        changed = [about, comparison, comparison_text, report_text, report_more, report_about, accuracies, distances]
        changed += [heat, kind, download, loading, status]
        changed += [opened, choice, tabs, demand, work, num_steps, scheduler, seed]
        gr.on([open_button.click, name.submit], open_generator, name, changed)
        if pipeline_id:
            app.load(open_generator, name, changed)
        # Of moves that come while one is answered, the last one counts.
        latest = {"trigger_mode": "always_last", "show_progress": "hidden"}
        settings = [num_steps, scheduler, seed]
        gr.on([box.input for box in settings], show_work, [opened, choice, *settings], work, **latest)

        with controls:

            @gr.render(inputs=opened, triggers=[opened.change])
            def make_controls(now):
                if now is None:
                    return
                source = explore.load_source(now[0])
                first = on_demand.first_choice(source.pipe.condition_encoder)
                with gr.Row():
                    boxes = [make_control(source, name, value) for name, value in first.task.items()]
                names = list(first.told)
                told = gr.CheckboxGroup(names, value=names, label="The generator is told", interactive=True)
                moved = [box.input for box in (*boxes, told)]
                gr.on(moved, choose, [opened, *settings, told, *boxes], [choice, work], **latest)

        sampling = sample_button.click(
            sample,
            [name, num_models, num_steps, scheduler, seed, kind, opened, choice],
            [status, distances, accuracies, comparison, comparison_text, heat, download, loading],
            show_progress="hidden",
            concurrency_limit=1,
        )
        stop_button.click(None, cancels=[sampling]).then(lambda: "Stopped.", None, status)
    return app
