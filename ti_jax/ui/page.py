"""The page: its parts, and which function answers which of them. What they do is in the modules beside this one.

Every function checks what it is given: Gradio's API takes calls that no part of the page would make.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ti_jax.config import dump_yaml
from ti_jax.errors import InputError, utf8
from ti_jax.files import write_atomically
from ti_jax.ui import pictures, processes, saving, shown
from ti_jax.ui.runs import PICTURES, SETTINGS_FILE, Runs, config_of, words_of
from ti_jax.ui.settings import EXAMPLE, EXAMPLE_WORD, PRESETS, Form, Models, make_config, number, whole
from ti_jax.ui.trying import MOST_PICTURES, Drawer, Wanted, compare

EVERY = 2.0  # seconds between two looks at the folder of the run that is shown
# Gradio would look whether a choice is one that it has sent, and after a restart of the server it has sent none. The
# functions look themselves, in the run's folder.
AS_SENT: dict[str, Any] = {"preprocess": False}
NEW, LEARN, TRY, SAVE = "new", "learn", "try", "save"


@dataclass(frozen=True)
class Server:
    """What the page's functions have in common.

    Attributes:
      aside: a folder for files that are on their way to the browser.
    """

    runs: Runs
    models: Models
    drawer: Drawer
    aside: Path

    def folder_aside(self) -> Path:
        """A new empty folder in ``aside``."""
        return Path(tempfile.mkdtemp(dir=self.aside))


def build(server: Server) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="ti_jax", analytics_enabled=False, delete_cache=(600, 6 * 3600), fill_width=True) as page:
        gr.HTML(shown.HEADER)
        seen = gr.State({})  # what the browser has of the run that is shown
        with gr.Sidebar(width=260):
            gr.Markdown("### Runs")
            run = gr.Radio([], show_label=False, container=False, elem_id="runs")
            gr.Markdown(f"of the folder `{shown.short(server.runs.root)}`", elem_classes="soft")
        with gr.Tabs(selected=NEW) as tabs:
            with gr.Tab("1  Pictures and word", id=NEW):
                form = _new_word(server)
            with gr.Tab("2  Learn", id=LEARN):
                watch = _learn()
            with gr.Tab("3  Try", id=TRY):
                trial = _try(server, run)
            with gr.Tab("4  Save", id=SAVE):
                saved = _save(server, run)
        timer = gr.Timer(EVERY)

        def tick(name: Any, seen: dict[str, Any], look_again: bool = False) -> Any:
            """All parts that show the run, where they have changed."""
            names, given = server.runs.names(), name
            name = name if name in names else (names[0] if names else None)
            found = shown.of_run(server.runs, name, {} if look_again or seen.get("name") != name else seen)
            choices = [(shown.label(server.runs, each), each) for each in names]
            # What is chosen is the browser's, unless it must be another: the user may have gone on meanwhile.
            chosen = {"value": name} if look_again or name != given else {}
            listed = gr.Radio(choices=choices, **chosen) if chosen or choices != seen.get("list") else gr.skip()
            found.seen["list"] = choices
            return [found.seen, listed, *found.parts]

        def opened(name: Any) -> Any:
            """The page as it comes: of a run that goes on the second step."""
            found = tick(name, {}, look_again=True)
            return [gr.Tabs(selected=LEARN) if shown.goes_on(found[0]) else gr.skip(), *found]

        shows = [seen, run, *watch.parts, *trial, saved.word]
        quietly = dict(show_progress="hidden", **AS_SENT)
        timer.tick(_kind(tick), [run, seen], shows, api_name="watch", **quietly)
        run.input(_kind(tick), [run, seen], shows, api_visibility="private", **quietly)
        page.load(_kind(opened), [run], [tabs, *shows], api_visibility="private", **quietly)

        def learn(files: Any, table: Any, *fields: Any) -> Any:
            """Start a run with the pictures and settings, and show it."""
            name = start(server, files, table, Form(*("" if field is None else str(field) for field in fields)))
            return [gr.Tabs(selected=LEARN), *tick(name, {}, look_again=True)]

        def stop(name: Any) -> None:
            processes.stop(server.runs.folder(name))
            gr.Info("asked to stop; a checkpoint is being saved")

        def resume(name: Any, steps: Any) -> None:
            server.drawer.close()
            processes.resume(server.runs.folder(name), whole("steps", steps))

        form.learn.click(_kind(learn), [form.files, form.captions, *form.fields], [tabs, *shows], api_name="learn")
        looks = dict(inputs=[run, seen], outputs=shows, api_visibility="private", **quietly)
        watch.stop.click(_kind(stop), [run], [], api_name="stop", **AS_SENT).then(_kind(tick), **looks)
        watch.resume.click(_kind(resume), [run, watch.until], [], api_name="resume", **AS_SENT).then(
            _kind(tick), **looks
        )
        watch.report.expand(_kind(lambda name: shown.report(server.runs, name)), [run], [watch.report_page],
                            api_name="report", **AS_SENT)  # fmt: skip
    return page


def start(server: Server, files: Any, table: Any, form: Form) -> str:
    """Make the folder of a new run, with its pictures and settings, and start it; returns its name.

    Raises:
      InputError: something is wrong with the pictures or the settings; there is no folder then.
    """
    word = form.word.strip()
    folder = server.runs.new(word or "word")
    try:
        inside = folder / PICTURES
        inside.mkdir()
        pictures.copy_files(_dropped(server, files), inside)
        pictures.write_captions(inside, pictures.captions_in(table))
        config = make_config(form, server.models, inside, folder)
        refused = pictures.look_at(inside, server.folder_aside(), config.pretrained_model_name_or_path).refused
        if refused and not config.skip_bad_images:
            raise InputError(
                f"{', '.join(refused)}: cannot be learned from; remove {'it' if len(refused) == 1 else 'them'} from "
                f"the pictures"
            )
        write_atomically(folder / SETTINGS_FILE, utf8(dump_yaml(config)).encode())
    except BaseException:
        shutil.rmtree(folder)
        raise
    server.drawer.close()
    processes.begin(folder)
    return folder.name


def _dropped(server: Server, files: Any) -> list[str]:
    """The files that were dropped on the page.

    Raises:
      InputError: there are none, or a path that leads elsewhere.
    """
    if not files:
        raise InputError("no pictures: drop three to five of what is to be learned, or take the example")
    for file in files:
        if not Path(file).resolve().is_relative_to(server.aside.resolve()):
            raise InputError(f"{file}: was not dropped on the page")
    return list(files)


def _kind(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with an `InputError` shown on the page as its one line, until it is closed."""

    def answer(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except InputError as error:
            raise gr.Error(
                escape(" ".join(str(error).split()), quote=False), duration=None, title="Please check",
                print_exception=False,
            ) from error  # fmt: skip

    answer.__doc__ = function.__doc__
    return answer


@dataclass(frozen=True)
class _NewWord:
    files: gr.Component
    captions: gr.Component
    fields: list[gr.Component]
    learn: gr.Button


def _new_word(server: Server) -> _NewWord:
    """The first tab: pictures with their preview, the word, the model, and what matters most of the settings."""
    with gr.Row():
        with gr.Column(scale=5):
            files = gr.File(file_count="multiple", label="Pictures: three to five are enough", height=180,
                            elem_id="pictures")  # fmt: skip
            example = gr.Button("Take the example: four pictures of Cleo", size="sm", elem_id="example")
            with gr.Row():
                word = gr.Textbox(label="New word", placeholder="<cat-toy>", elem_id="word",
                                  info="a name that the model does not know")  # fmt: skip
                initializer = gr.Textbox(label="Start from", placeholder="toy", elem_id="initializer",
                                         info="a word that it knows; empty for the embedded model")  # fmt: skip
            model = gr.Dropdown(list(server.models.offered), value=next(iter(server.models.offered)), label="Model",
                                allow_custom_value=True, elem_id="model",
                                info="from the list, or a Hugging Face hub id (owner/name)")  # fmt: skip
            with gr.Row():
                kind = gr.Radio([("object or person", "object"), ("style", "style")], value="object",
                                label="The pictures share an")  # fmt: skip
                preset = gr.Radio(list(PRESETS), label="Settings of", value=None, visible=False,
                                  info="for the model's family")  # fmt: skip
            with gr.Row():
                steps = gr.Textbox(label="Steps", elem_id="steps", placeholder="by model", min_width=90)
                rate = gr.Textbox(label="Learning rate", placeholder="by model", elem_id="rate", min_width=90)
                vectors = gr.Textbox(label="Vectors", placeholder="1", elem_id="vectors", min_width=90)
            with gr.Accordion("More settings", open=False, elem_id="more"):
                with gr.Row():
                    batch = gr.Textbox(label="Pictures a step", placeholder="by model",
                                      elem_id="batch")  # fmt: skip
                    every = gr.Textbox(label="Steps between progress pictures and checkpoints",
                                      placeholder="a fifth of all", elem_id="every")  # fmt: skip
                prompts = gr.Textbox(label="Progress pictures of these prompts", lines=2, value="a portrait of {}",
                                     info="one a line; {} stands for the word", elem_id="prompts")  # fmt: skip
                further = gr.Textbox(label="Further settings", lines=3, placeholder="seed: 3\nflip_probability: 0",
                                     info="name: value, one a line, as ti-jax train --help has them",
                                     elem_id="further")  # fmt: skip
            learn = gr.Button("Learn", variant="primary", elem_id="learn")
        with gr.Column(scale=6):
            sheet = gr.Image(label="What is learned from", interactive=False, elem_id="sheet", height=340,
                             buttons=["fullscreen"])  # fmt: skip
            remarks = gr.Markdown("Drop pictures to see how they are cropped.", elem_id="remarks")
            captions = gr.Dataframe(headers=["picture", "caption"], datatype="str", type="array", interactive=True,
                                    column_count=2, label="Captions (optional)", wrap=True, static_columns=[0],
                                    elem_id="captions", visible=False)  # fmt: skip

    def look(files: Any, model: Any) -> Any:
        """How the dropped pictures are cropped, what is wrong with them, and their captions."""
        if not files:
            return None, "Drop pictures to see how they are cropped.", gr.Dataframe(value=[], visible=False)
        with tempfile.TemporaryDirectory(dir=server.aside) as name:
            inside = Path(name) / PICTURES
            inside.mkdir()
            pictures.copy_files(_dropped(server, files), inside)
            found = pictures.look_at(inside, Path(name), server.models.path(model))
        rows = [[name, caption] for name, caption in found.captions.items()]
        return found.sheet, shown.remarks(found), gr.Dataframe(value=rows, visible=True)

    def take_example() -> Any:
        folder = server.folder_aside()  # Gradio hands out no file from elsewhere
        return [shutil.copy(path, folder) for path in sorted(EXAMPLE.glob("*.png"))], EXAMPLE_WORD

    def suit(model: Any) -> Any:
        """What depends on the model."""
        embedded = server.models.offered.get(model, "") is None
        return gr.Radio(visible=not embedded), "a portrait of {}" if embedded else "a photo of {}"

    example.click(take_example, [], [files, word], api_visibility="private")
    files.change(_kind(look), [files, model], [sheet, remarks, captions], api_name="look", show_progress="minimal")
    model.change(suit, [model], [preset, prompts], api_visibility="private")
    fields = [model, word, initializer, kind, steps, rate, vectors, batch, preset, prompts, every, further]
    return _NewWord(files, captions, fields, learn)


@dataclass(frozen=True)
class _Watch:
    parts: list[Any]
    stop: gr.Button
    resume: gr.Button
    until: gr.Component
    report: gr.Accordion
    report_page: gr.Component


def _learn() -> _Watch:
    """The second tab: the run as its folder has it."""
    state = gr.HTML(elem_id="state")
    with gr.Row():
        stop = gr.Button("Stop", interactive=False, elem_id="stop", size="md", scale=0, min_width=140)
        resume = gr.Button("Resume", interactive=False, elem_id="resume", size="md", scale=0, min_width=140)
        until = gr.Textbox(placeholder="to step: as before", elem_id="until", show_label=False, container=False,
                           scale=0, min_width=180)  # fmt: skip
    with gr.Row():
        with gr.Column(scale=6):
            curve = gr.HTML(elem_id="curve")
            overview = gr.Image(show_label=False, interactive=False, elem_id="overview", visible=False,
                                buttons=["download", "fullscreen"])  # fmt: skip
        with gr.Column(scale=4):
            progress = gr.Image(show_label=False, interactive=False, elem_id="progress", buttons=["fullscreen"],
                                visible=False)  # fmt: skip
    with gr.Accordion("Report", open=False, elem_id="report") as report:
        page = gr.HTML("")
    with gr.Accordion("What the process says", open=False):
        log = gr.Code(language=None, show_label=False, interactive=False, max_lines=20)
    return _Watch([state, stop, resume, curve, progress, overview, log], stop, resume, until, report, page)


def _try(server: Server, run: gr.Component) -> list[Any]:
    """The third tab: prompts with the word, without it, and with another state of it."""
    with gr.Row():
        with gr.Column(scale=4):
            prompts = gr.Textbox(label="Prompts", lines=3, 
                                 info="one a line; {} stands for the word", elem_id="try-prompts")  # fmt: skip
            word = gr.Dropdown([], label="Draw with", elem_id="try-word")
            other = gr.Dropdown([shown.NO_OTHER], value=shown.NO_OTHER, label="Compare with", elem_id="try-other")
            with gr.Row():
                plain = gr.Checkbox(True, label="Also without the word", elem_id="try-plain")
                without = gr.Textbox("a person", label="In its place", elem_id="try-without")
            with gr.Row():
                count = gr.Slider(1, MOST_PICTURES, value=4, step=1, label="Pictures", elem_id="try-count")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="Negative prompt")
                with gr.Row():
                    steps = gr.Textbox(label="Sampler's steps", placeholder="by model")
                    guidance = gr.Textbox(label="Guidance scale", placeholder="by model")
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=6):
            picture = gr.Image(show_label=False, interactive=False, elem_id="drawn", format="png",
                               buttons=["download", "fullscreen"])  # fmt: skip
            notes = gr.Markdown()

    def drawn(name: Any, prompts: Any, word: Any, other: Any, plain: Any, without: Any, count: Any, seed: Any,
              negative: Any, steps: Any, guidance: Any) -> Any:  # fmt: skip
        """Draw prompts with a word of a run, and beside it without the word or with another state of it."""
        folder = server.runs.folder(name)
        known = words_of(folder)
        chosen = [each for each in (word, other) if each and each != shown.NO_OTHER]
        if not chosen:
            raise InputError("there is no word yet: it can be tried once the run has saved one")
        for each in chosen:
            if each not in known:
                raise InputError(f"{each!r}: not a word of this run; choose one from the list")
        wanted = Wanted(
            tuple(str(prompts).splitlines()), {each: server.runs.file(name, known[each]) for each in chosen},
            str(without or "") if plain else None, whole("pictures", count) or 1, int(number("seed", seed) or 0),
            whole("steps", steps), number("guidance scale", guidance),
            str(negative or "") or None,
        )  # fmt: skip
        found, said = compare(server.drawer, config_of(folder), wanted)
        return found, "\n".join(f"- {line}" for line in said)

    fields = [run, prompts, word, other, plain, without, count, seed, negative, steps, guidance]
    draw.click(_kind(drawn), fields, [picture, notes], api_name="draw", **AS_SENT)
    return [word, other, prompts, without]


@dataclass(frozen=True)
class _Saved:
    word: gr.Component


def _save(server: Server, run: gr.Component) -> _Saved:
    """The fourth tab: the word as a file, and what to do with it."""
    with gr.Row():
        with gr.Column(scale=4):
            word = gr.Dropdown([], label="Save", elem_id="save-word")
            form = gr.Radio([(shown.FORMAT_NAMES.get(name, name), name) for name in saving.SUFFIXES][::-1],
                            value="diffusers", label="For", elem_id="format")  # fmt: skip
            save = gr.Button("Save", variant="primary", elem_id="save")
            files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
        with gr.Column(scale=6):
            how = gr.Markdown(elem_id="how")

    def saved(name: Any, word: Any, format_name: Any) -> Any:
        """Write a word of a run in a format."""
        folder = server.runs.folder(name)
        known = words_of(folder)
        if word not in known:
            raise InputError("there is no word yet: it can be saved once the run has" if not known else
                             f"{word!r}: not a word of this run; choose one from the list")  # fmt: skip
        path = server.runs.file(name, known[word])
        written, warnings = saving.save_as(path, str(format_name), server.folder_aside())
        return list(map(str, written)), shown.usage(saving.how_to_use(path, config_of(folder)), warnings)

    save.click(_kind(saved), [run, word, form], [files, how], api_name="save", **AS_SENT)
    return _Saved(word)
