"""The page of the demo, in Gradio: conversation, sampling options, attention maps.

It works without a network: Gradio's fonts and scripts come from its package, and the browser is
told to load nothing from other hosts.
"""

import html
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from vlm_jax.data import images as image_files
from vlm_jax.demo.talk import SENTENCES, ChatModel, Reply, Talk, describe
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.look import COMPUTED
from vlm_jax.infer.look.page import TITLES
from vlm_jax.serve.limits import Limits

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
BROWSER_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP")
UPLOAD_SECONDS = 24 * 3600  # after which the file of an image is deleted
# Questions and maps take turns, because they use the same accelerator.
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}
ANSWERING, DRAWING = "Answering …", "Computing the attention maps …"
WAITING = "The attention maps follow the answer."
NO_MAPS = "Ask about an image: the maps of the answer appear here, one for each word."
CSS = (Path(__file__).parent / "page.css").read_text()
# The frame is as high as the page in it.
FRAME = (
    '<iframe class="maps" title="attention maps of the answer" srcdoc="{page}" '
    'onload="const frame = this, root = frame.contentDocument.documentElement; '
    "new ResizeObserver(() => {{ frame.style.height = root.offsetHeight + 'px' }}).observe(root)"
    '"></iframe>'
)


def build_app(models: Sequence[ChatModel], options: AnswerOptions, limits: Limits) -> FastAPI:
    """Returns the application; `options` are the first values of the sampling options."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_WithPolicy)
    page = Page(models, options, limits)
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        css=CSS,
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=limits.max_image_bytes,
    )


class _WithPolicy:
    """Adds a Content-Security-Policy to every response of an application."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = message | {"headers": [*message.get("headers", ()), header]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


class Page:
    """The components of the page, and the functions that their events call."""

    def __init__(self, models: Sequence[ChatModel], options: AnswerOptions, limits: Limits):
        self._models = models
        self._options = options
        self._limits = limits
        title = " and ".join(model.name for model in models)
        with gr.Blocks(
            title=f"{title}: vlm_jax",
            analytics_enabled=False,
            delete_cache=(3600, UPLOAD_SECONDS),
        ) as self.blocks:
            self._talk = gr.State(None)
            gr.HTML(f"<h1>{html.escape(title)}</h1>")
            if len(models) == 1:
                with gr.Row():
                    with gr.Column(scale=6, min_width=320):
                        self._add_chat()
                    with gr.Column(scale=5, min_width=320):
                        self._add_maps()
            else:
                self._add_chat()
                self._add_maps()
            self._connect()
        self.blocks.queue(max_size=limits.max_queue)

    def _add_chat(self) -> None:
        with gr.Row():
            self._chats = [self._chat(model) for model in self._models]
        self._box = gr.MultimodalTextbox(
            label="Question",
            show_label=False,
            placeholder="A question; images with the button or dropped here",
            file_types=["image"],
            file_count="multiple",
            max_plain_text_length=self._limits.max_text_characters,
            autofocus=True,
        )
        self._status = gr.HTML(_note(""), elem_id="status")
        with gr.Row():
            self._undo = gr.Button("Undo", size="sm", min_width=120)
            self._reset = gr.Button("New conversation", size="sm", min_width=120)
        with gr.Accordion("Sampling", open=False), gr.Row():
            # Their bounds are checked by `AnswerOptions`.
            numbers = {
                "temperature": {"label": "temperature", "step": 0.1},
                "top_p": {"label": "top p", "step": 0.05},
                "top_k": {"label": "top k (0: all)", "precision": 0},
                "seed": {"label": "seed", "precision": 0},
                "max_new_tokens": {"label": "most tokens of an answer", "precision": 0},
            }
            self._sampling = {
                name: gr.Number(getattr(self._options, name), min_width=120, **settings)
                for name, settings in numbers.items()
            }

    def _chat(self, model: ChatModel) -> gr.Chatbot:
        # Plain text: Markdown of a model could have links and images of other hosts.
        return gr.Chatbot(
            label=model.name,
            height=None,
            min_height="12rem",
            max_height="min(60vh, 26rem)",
            min_width=280,
            render_markdown=False,
            latex_delimiters=[],
            allow_tags=False,
            buttons=[],
            allow_file_downloads=False,
            elem_classes="chat",
        )

    def _add_maps(self) -> None:
        gr.HTML("<h2>Attention maps</h2>")
        self._number = gr.Dropdown([], label="answer to", interactive=True)
        self._methods = gr.CheckboxGroup(
            [(TITLES[name], name) for name in COMPUTED], label="compute also"
        )
        self._shows = gr.Checkbox(True, label="show after each answer")
        self._maps = gr.HTML(_note(NO_MAPS), elem_id="maps")

    def _connect(self) -> None:
        chats = [self._talk, *self._chats, self._status, self._number]
        asked = self._box.submit(
            self.ask,
            [self._talk, self._box, *self._sampling.values()],
            [*chats, self._box, self._maps],
            api_name="ask",
            show_progress="hidden",
            **ONE_AT_A_TIME,
        )
        look = {
            "fn": self.look,
            "inputs": [self._talk, self._number, self._methods, self._shows],
            "outputs": [self._maps],
            "show_progress": "hidden",
            **ONE_AT_A_TIME,
        }
        looked = asked.then(**look, api_name="look")
        look["api_visibility"] = "undocumented"
        ends = {"cancels": [asked, looked], "show_progress": "hidden"}
        outputs = [*chats, self._box]
        self._box.stop(self.stop, [self._talk], outputs, api_name="stop", **ends).then(**look)
        self._undo.click(self.undo, [self._talk], outputs, api_name="undo", **ends).then(**look)
        self._reset.click(self.reset, None, outputs, api_name="reset", **ends).then(**look)
        for control in (self._shows, self._number, self._methods):
            control.input(**look)

    def ask(self, talk: Talk | None, message: dict, *sampling) -> Generator[dict]:
        """Answers a question, and yields what the components show."""
        talk = talk or Talk(self._models, self._limits)
        options = replace(self._options, **dict(zip(self._sampling, sampling)))
        is_asked = False
        try:
            for _ in talk.ask(message["text"], message["files"], options):
                shown = self._show(talk, ANSWERING)
                if not is_asked:
                    is_asked = True
                    shown[self._box] = gr.MultimodalTextbox(
                        {"text": "", "files": []}, submit_btn=False, stop_btn=True
                    )
                    shown[self._maps] = _note(WAITING)
                yield shown
        except SENTENCES as error:
            # The question stays in its box, to be changed.
            yield self._show(talk, describe(error), is_error=True)
            return
        yield self._show(talk)

    def stop(self, talk: Talk | None) -> dict:
        """Ends an answer; what was generated stays."""
        if talk:
            talk.stop()
        return self._show(talk)

    def undo(self, talk: Talk | None) -> dict:
        """Removes the last question and its answers."""
        if talk:
            talk.undo()
        return self._show(talk)

    def reset(self) -> dict:
        """Begins a new conversation."""
        return self._show(None)

    def look(
        self, talk: Talk | None, number: int | None, methods: list[str], is_shown: bool
    ) -> Generator[str]:
        """Yields the attention maps of a turn, as HTML."""
        if not (is_shown and talk and talk.turns):
            yield _note(NO_MAPS)
            return
        yield _note(DRAWING)
        number = len(talk.turns) - 1 if number is None else number
        page, sentences = talk.render_maps(min(number, len(talk.turns) - 1), methods)
        notes = "".join(_note(sentence) for sentence in sentences)
        frame = FRAME.format(page=html.escape(page)) if page else ""
        yield notes + frame or _note(NO_MAPS)

    def _show(self, talk: Talk | None, status: str = "", is_error: bool = False) -> dict:
        """Returns the values of the components for the state of a conversation."""
        turns = talk.turns if talk else []
        is_answering = status == ANSWERING
        shown = {self._talk: talk, self._status: _note(status, is_error)}
        for index, chat in enumerate(self._chats):
            messages = []
            for turn in turns:
                images = [
                    {"path": _displayable(file), "alt_text": Path(file).name}
                    for file in turn.images
                ]
                texts = [_text(turn.question)] if turn.question else []
                messages.append({"role": "user", "content": [*images, *texts]})
                is_open = is_answering and turn is turns[-1]
                text = _reply_text(turn.replies[index], is_open)
                messages.append({"role": "assistant", "content": [_text(text)]})
            shown[chat] = messages
        if not is_error:
            choices = [(f"{i + 1}. {turn.question[:60]}", i) for i, turn in enumerate(turns)]
            last = len(turns) - 1 if turns else None
            shown[self._number] = gr.Dropdown(choices=choices, value=last)
        if not is_answering:
            shown[self._box] = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
        return shown


def _displayable(file: str) -> str:
    """Returns an image file that browsers show: the file itself, or a PNG of it beside it."""
    with Image.open(file) as image:
        if image.format in BROWSER_FORMATS:
            return file
    shown = Path(f"{file}.png")
    if not shown.exists():
        image_files.decode(image_files.read_bytes(file), shown.name).save(shown)
    return str(shown)


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _reply_text(reply: Reply, is_open: bool) -> str:
    if reply.error:
        return f"{reply.text}\n⚠ {reply.error}".strip()
    return reply.text.strip() or ("…" if is_open else "(empty answer)")


def _note(text: str, is_error: bool = False) -> str:
    """Returns a sentence about the state, which screen readers read aloud."""
    role = "alert" if is_error else "status"
    return f'<p class="note" role="{role}">{html.escape(text)}</p>'
