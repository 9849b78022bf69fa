"""The page: fields and buttons around :mod:`scripts.app.handlers`. Needs the package gradio."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from engine.image_generator import Generated
from models.sampling import CFG_SCHEDULES
from orders.draw import ORDER_KINDS, default_repulsion
from scripts.app.handlers import MAX_WATCHED, Handlers, Source, mask_of_layers, png_of, shown, to_paint
from scripts.picture_flags import CFG
from util.errors import UserError

TITLE = "Locality-aware parallel decoding"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = ".pictures img, .frame img { image-rendering: pixelated; }"
_PLAYED_IN = 8.0  # seconds, as far as that leaves each step a time within these:
_STEP_AT_LEAST, _STEP_AT_MOST = 0.15, 0.5
# All that computes waits in one line, so that requests do not take each other's processor.
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
_DRAWN: dict[str, Any] = {**_ONE_AT_A_TIME, "concurrency_id": "orders", "show_progress": "hidden"}
_AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}


def _sentences(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, whose UserErrors are messages on the page."""

    @functools.wraps(handler)
    def run(*values: Any) -> Any:
        try:
            return handler(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return run


class _Sampling:
    """The fields of guidance, temperature and so on, and their values by name."""

    names = ("cfg", "cfg_schedule", "temperature", "top_k", "top_p")

    def __init__(self, vocab_size: int) -> None:
        guidance = gr.Slider(1, 10, value=CFG, step=0.1, label="Guidance (1: none)")
        with gr.Accordion("Sampling", open=False):
            schedule = gr.Radio(CFG_SCHEDULES, value="linear", label="Guidance along the order")
            temperature = gr.Slider(0.1, 2, value=1, step=0.05, label="Temperature")
            top_k = gr.Slider(0, vocab_size, value=0, step=1, label="Top-k: draw from so many codes (0: all)")
            top_p = gr.Slider(0.05, 1, value=1, step=0.01, label="Top-p: draw from this share of probability")
        self.fields = [guidance, schedule, temperature, top_k, top_p]

    @classmethod
    def named(cls, values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(cls.names, values, strict=True))


def _seed(value: int = 0) -> gr.Number:
    return gr.Number(value, label="Seed", precision=0)


def build(handlers: Handlers, folder: Path) -> gr.Blocks:
    """The page of a model.

    Args:
        folder: for files to download; the server removes it when it stops.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{handlers.description()}")
        with gr.Tab("Generate"):
            made, chosen = _generate_tab(handlers, folder)
        with gr.Tab("Watch"):
            _watch_tab(handlers)
        with gr.Tab("Edit"):
            _edit_tab(handlers, made, chosen)
        with gr.Tab("Orders"):
            _orders_tab(handlers, page)
    page.queue(max_size=32, default_concurrency_limit=1)
    return page


def _class(handlers: Handlers, **options: Any) -> gr.Dropdown:
    return gr.Dropdown(handlers.classes, allow_custom_value=True, **options)


def _steps(handlers: Handlers, **options: Any) -> gr.Slider:
    options = {"label": "Decoding steps", "value": handlers.default_steps, **options}
    return gr.Slider(1, handlers.grid**2, step=1, **options)


def _generate_tab(handlers: Handlers, folder: Path) -> tuple[gr.State, gr.State]:
    """Returns what was generated last, and the number of the picture that was clicked."""
    made, chosen = gr.State(), gr.State(0)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            classes = _class(handlers, label="Classes", value=handlers.classes[:1], multiselect=True)
            count = gr.Slider(1, 16, value=4, step=1, label="Pictures of each")
            steps, order = _steps(handlers), gr.Dropdown(ORDER_KINDS, value="lpd", label="Order")
            seed, sampling = _seed(), _Sampling(handlers.generator.model.config.vocab_size)
            button = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Column(scale=2):
            gallery = gr.Gallery(
                show_label=False, columns=4, object_fit="contain", height="auto", format="png", elem_id="pictures",
                elem_classes="pictures", buttons=["download", "fullscreen"],
            )  # fmt: skip
            line = gr.Markdown(elem_id="generated")
            download = gr.DownloadButton("Download all (ZIP)", visible=False, elem_id="download")

    @_sentences
    def run(
        request: gr.Request, classes: list[str], count: int, steps: int, order: str, seed: int, *values: Any
    ) -> tuple[Any, ...]:
        settings = {"steps": steps, "order": order, "seed": seed, **_Sampling.named(values)}
        generated, labels, text = handlers.generate(classes, count, **settings)
        file = folder / f"pictures_{request.session_hash}.zip"
        file.write_bytes(handlers.archive(generated, labels, settings))
        pictures = [(shown(picture), label) for picture, label in zip(generated.pictures, labels, strict=True)]
        return (
            generated,
            0,
            gr.Gallery(pictures, selected_index=None),
            text,
            gr.DownloadButton(value=str(file), visible=True),
        )

    def select(event: gr.SelectData) -> int:
        return event.index

    outputs = [made, chosen, gallery, line, download]
    button.click(run, [classes, count, steps, order, seed, *sampling.fields], outputs, **_ONE_AT_A_TIME)
    gallery.select(select, None, chosen, **_AT_ONCE)
    return made, chosen


def _watch_tab(handlers: Handlers) -> None:
    films = gr.State([[], []])  # of either side the frames, as PNG
    most = min(MAX_WATCHED, handlers.grid**2)
    fields, images, lines = [], [], []
    with gr.Row():
        name, seed = _class(handlers, label="Class", value=handlers.classes[0]), _seed()
        guidance = gr.Slider(1, 10, value=CFG, step=0.1, label="Guidance (1: none)")
        button = gr.Button("Decode both", variant="primary", elem_id="watch")
    with gr.Row():
        for side, (order, steps) in enumerate((("lpd", min(most, handlers.default_steps)), ("raster", most))):
            with gr.Column():
                with gr.Row():
                    fields.append(gr.Dropdown(ORDER_KINDS, value=order, label="Order"))
                    fields.append(gr.Slider(1, most, value=steps, step=1, label="Decoding steps"))
                images.append(
                    gr.Image(
                        show_label=False, format="png", buttons=[], interactive=False, elem_id=f"frame{side}",
                        elem_classes="frame",
                    )
                )  # fmt: skip
                lines.append(gr.Markdown(elem_id=f"time{side}"))
    with gr.Row(equal_height=True):
        step = gr.Slider(1, most, value=1, step=1, label="Step", elem_id="step", scale=5)
        play = gr.Button("Play", elem_id="play", scale=1)
    gr.Markdown(
        "Of each pair the left shows the grid: green cells are chosen in this step, dark grey ones were known before; "
        "the right shows what has been decoded so far."
    )
    timer = gr.Timer(_STEP_AT_MOST, active=False)

    @_sentences
    def run(name: str, cfg: float, seed: int, *fields: Any) -> tuple[Any, ...]:
        (left, left_line), (right, right_line) = (
            handlers.watch(name, fields[i + 1], fields[i], seed, cfg=cfg) for i in (0, 2)
        )
        last = max(len(left), len(right))
        stopped = gr.Slider(maximum=last, value=last), gr.Timer(active=False), "Play"
        return [[png_of(frame) for frame in film] for film in (left, right)], left_line, right_line, *stopped

    def show(step: int, films: list[list[bytes]]) -> list[Any]:
        return [Image.open(io.BytesIO(film[min(step, len(film)) - 1])) if film else None for film in films]

    def start_or_stop(label: str, step: int, films: list[list[bytes]]) -> tuple[Any, ...]:
        last = max(map(len, films))
        if label == "Stop" or not last:
            return step, gr.Timer(active=False), "Play"
        seconds = min(_STEP_AT_MOST, max(_STEP_AT_LEAST, _PLAYED_IN / last))
        return 1 if step >= last else step, gr.Timer(seconds, active=True), "Stop"

    def tick(step: int, films: list[list[bytes]]) -> tuple[Any, ...]:
        last = max(map(len, films))
        return min(step + 1, last), gr.Timer(active=step + 1 < last), "Stop" if step + 1 < last else "Play"

    decoded = button.click(run, [name, guidance, seed, *fields], [films, *lines, step, timer, play], **_ONE_AT_A_TIME)
    # The slider does not change where it stands at the end already.
    decoded.success(show, [step, films], images, **_AT_ONCE)
    step.change(show, [step, films], images, trigger_mode="always_last", **_AT_ONCE)
    play.click(start_or_stop, [play, step, films], [step, timer, play], **_AT_ONCE)
    timer.tick(tick, [step, films], [step, timer, play], **_AT_ONCE)


def _edit_tab(handlers: Handlers, made: gr.State, chosen: gr.State) -> None:
    source, side = gr.State(), handlers.painted_side
    with gr.Row():
        with gr.Column(min_width=320):
            gr.Markdown("Take a picture, and paint over what should be generated anew.")
            with gr.Row():
                upload = gr.UploadButton("Upload", file_types=["image"], elem_id="upload")
                take = gr.Button("Take generated one", elem_id="take")
            editor = gr.ImageEditor(
                show_label=False, type="pil", sources=(), transforms=(), layers=False, buttons=[], height=side,
                brush=gr.Brush(default_size=side // 16, colors=["rgba(232, 89, 12, 0.8)"], color_mode="fixed"),
                canvas_size=(side, side), fixed_canvas=True, format="png", elem_id="editor", elem_classes="pictures",
            )  # fmt: skip
            inverted = gr.Checkbox(label="The other way round: keep what is painted")
        with gr.Column(min_width=320):
            with gr.Row():
                # With the seed that made a picture a variant repeats its draws, hence another one.
                name, seed = _class(handlers, label="Class", value=handlers.classes[0]), _seed(1)
            with gr.Row():
                variants = gr.Slider(1, 16, value=4, step=1, label="Variants")
                steps = _steps(handlers, label="Steps of a picture")
            keep = gr.Checkbox(True, label="Keep the pixels of what is not generated, with a soft border")
            sampling = _Sampling(handlers.generator.model.config.vocab_size)
            button = gr.Button("Generate anew", variant="primary", elem_id="edit")
            line = gr.Markdown(elem_id="edited_line")
            gallery = gr.Gallery(
                show_label=False, columns=3, object_fit="contain", height="auto", format="png", elem_id="edited",
                elem_classes="pictures", buttons=["download", "fullscreen"],
            )  # fmt: skip

    def opened(taken: Source) -> tuple[Any, Any]:
        return taken, {"background": to_paint(taken), "layers": [], "composite": None}

    @_sentences
    def from_file(path: str) -> tuple[Any, Any]:
        return opened(handlers.take_upload(path))

    @_sentences
    def from_generated(made: Generated | None, number: int) -> tuple[Any, Any]:
        return opened(handlers.take_generated(made, number))

    @_sentences
    def run(
        source: Source | None, painted: dict[str, Any] | None, inverted: bool, name: str, variants: int, steps: int,
        keep: bool, seed: int, *values: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        mask = mask_of_layers(painted["layers"] if painted else [], side)
        pictures, labels, text = handlers.edit(
            source, mask, inverted, name, variants, steps, keep, seed, **_Sampling.named(values)
        )
        return [(shown(picture), label) for picture, label in zip(pictures, labels, strict=True)], text

    upload.upload(from_file, upload, [source, editor], **_ONE_AT_A_TIME)
    take.click(from_generated, [made, chosen], [source, editor], **_ONE_AT_A_TIME)
    inputs = [source, editor, inverted, name, variants, steps, keep, seed, *sampling.fields]
    button.click(run, inputs, [gallery, line], **_ONE_AT_A_TIME)


def _orders_tab(handlers: Handlers, page: gr.Blocks) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            order = gr.Dropdown(ORDER_KINDS, value="lpd", label="Order")
            side = gr.Slider(2, 32, value=handlers.grid, step=1, label="Tokens per side")
            steps = gr.Slider(1, 64, value=handlers.default_steps, step=1, label="Decoding steps")
            proximity = gr.Slider(0, 7, value=1, step=0.1, label="Proximity threshold")
            repulsion = gr.Slider(0, 8, value=default_repulsion(handlers.grid), step=1, label="Repulsion threshold")
            seed = _seed()
        with gr.Column(scale=2):
            picture = gr.Image(show_label=False, format="png", interactive=False, buttons=["download"], elem_id="order")
            statistics = gr.Markdown(elem_id="statistics")
    fields = [order, side, steps, proximity, repulsion, seed]
    run = _sentences(handlers.draw_order)
    gr.on(
        [page.load, *(field.change for field in fields)], run, fields, [picture, statistics],
        trigger_mode="always_last", **_DRAWN,
    )  # fmt: skip
