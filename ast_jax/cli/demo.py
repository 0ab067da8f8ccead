"""The web demo, by Gradio: classify and explain an uploaded or recorded sound.

Nothing is loaded from other hosts: Gradio's page requests a script and fonts from them, which the content security
policy of every response forbids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

from ast_jax.audio.io import AudioError
from ast_jax.audio.streams import mono_blocks
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import load
from ast_jax.checkpoints.locate import shipped_models
from ast_jax.inference import explanations, pictures, predict
from ast_jax.runtime.progress import progress_display, step

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' ws: wss: data: blob:; worker-src 'self' blob:"
)
FONTS = ("system-ui", "sans-serif")
RATE = 16000  # Hz, at which durations are measured
PICTURES = 20  # that are kept; older ones are removed


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of uploads and recordings.

    Attributes:
        megabytes: maximum size of an upload.
        minutes: maximum duration of a sound.
    """

    megabytes: int = 50
    minutes: float = 10.0


def build_app(models: list[str], limits: Limits) -> Any:
    """Return the page as an ASGI application.

    Args:
        models: what `load` takes, to choose from; the first is the default. Shipped models follow them.
        limits: of uploads and recordings.

    Raises:
        ValueError: Gradio is missing.
        CheckpointError: the first model cannot be loaded.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    folder = tempfile.mkdtemp(prefix="ast_jax_demo_")
    os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads
    try:
        import fastapi
        import gradio
    except ImportError as error:
        raise ValueError("the demo needs Gradio; install it with: pip install 'ast-jax[demo]'") from error

    names = list(dict.fromkeys([*models, *shipped_models()]))
    with progress_display(), step("loading the model"):
        page = _Page(limits, {names[0]: load(names[0])}, folder)
    shown: dict[str, Any] = {"type": "filepath", "interactive": False, "buttons": ["download", "fullscreen"]}
    with gradio.Blocks(title="ast_jax", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.Markdown("# What is in this sound?\nDrop a sound or record one. It stays on this machine.")
        with gradio.Row():
            with gradio.Column(scale=1):
                audio = gradio.Audio(
                    sources=["upload", "microphone"],
                    type="filepath",
                    label="Sound",
                    elem_id="sound",
                    editable=False,
                    buttons=["download"],
                )
                model = gradio.Dropdown(names, value=names[0], label="Model", elem_id="model")
                threshold = gradio.Slider(0.05, 0.95, 0.5, step=0.05, label="Score threshold", elem_id="threshold")
                classify = gradio.Button("Classify", variant="primary", elem_id="classify")
                explain = gradio.Button("Explain", elem_id="explain")
            with gradio.Column(scale=2):
                message = gradio.Markdown(elem_id="message")
                labels = gradio.Label(label="Labels", num_top_classes=5, elem_id="labels")
        picture = gradio.Image(label="Timeline", elem_id="timeline", **shown)
        segments = gradio.Dataframe(
            headers=["start, s", "end, s", "label", "score"], label="Segments", elem_id="segments", interactive=False
        )
        explanation = gradio.Image(label="Explanation", elem_id="explanation", **shown)
        classify.click(
            page.classify,
            [audio, model, threshold],
            [message, labels, picture, segments],
            api_name="classify",
            concurrency_id="model",
        )
        explain.click(page.explain, [audio, model], [message, explanation], api_name="explain", concurrency_id="model")
    blocks.queue(max_size=20, default_concurrency_limit=1)

    app = fastapi.FastAPI()
    app.state.page = page

    @app.middleware("http")
    async def add_policy(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    return gradio.mount_gradio_app(
        app, blocks, path="/", max_file_size=f"{limits.megabytes}mb", theme=gradio.themes.Base(font=FONTS),
        allowed_paths=[page.folder], show_error=True, ssr_mode=False, footer_links=["api", "gradio"],
    )  # fmt: skip


def serve(models: list[str], limits: Limits, host: str, port: int, tell: Any) -> None:
    """Serve the page until interrupted.

    Args:
        models: as in `build_app`.
        limits: as in `build_app`.
        host: to listen on.
        port: to listen on; 0 for a free one.
        tell: called with the page's URL once it is served.

    Raises:
        OSError: the address is in use or not one of this machine.
        ValueError: see `build_app`.
        CheckpointError: see `build_app`.
    """
    with _listening(host, port) as listening:
        app = build_app(models, limits)
        import uvicorn

        class Server(uvicorn.Server):
            async def startup(self, *arguments: Any, **options: Any) -> None:
                await super().startup(*arguments, **options)
                if self.started:
                    name = f"[{host}]" if ":" in host else host
                    tell(f"http://{name}:{listening.getsockname()[1]}")

            async def shutdown(self, *arguments: Any, **options: Any) -> None:
                await super().shutdown(*arguments, **options)
                app.state.page.close()  # here, as a signal ends the process after it

        Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """Return a listening socket, before anything is loaded.

    Raises:
        OSError: the address is in use or not one of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{host}:{port}: {reason}; choose another --port, 0 for a free one") from error


class _Page:
    """The functions behind the page's buttons."""

    def __init__(self, limits: Limits, loaded: dict[str, Checkpoint], folder: str):
        self.limits, self.loaded, self.folder = limits, loaded, folder

    def close(self) -> None:
        """Remove pictures and uploads."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def classify(self, audio: str | None, model: str, threshold: float) -> Any:
        """Return a message, scores by label, the timeline picture and the segments of a sound."""
        with _shown_errors():
            sound, checkpoint = self._ready(audio, model)
            found = predict.analyze(sound, checkpoint)
            path = self._new_picture()
            pictures.timeline_picture(found, checkpoint.frontend, path, threshold)
            rows = [[f"{s.start:.2f}", f"{s.end:.2f}", s.label, f"{s.score:.3f}"] for s in found.timeline(threshold)]
            windows = f"{len(found.times)} windows" if len(found.times) > 1 else "one window"
            return f"Classified {found.duration:.2f} s in {windows}.", dict(found.best()), str(path), rows

    def explain(self, audio: str | None, model: str) -> Any:
        """Return a message and the picture of an explanation."""
        with _shown_errors():
            found = explanations.explain(*self._ready(audio, model))
            path = self._new_picture()
            pictures.explanation_picture(found, path)
            return f"Explained {found.duration:.2f} s from {found.start:.2f} s on.", str(path)

    def _ready(self, audio: str | None, model: str) -> tuple[str, Checkpoint]:
        """Check the sound's duration; return it and the loaded model."""
        if audio is None:
            raise AudioError("Drop or record a sound first.")
        seconds = 0.0
        for block in mono_blocks(audio, RATE):  # the duration in a header may be wrong
            seconds += len(block) / RATE
            if seconds > 60 * self.limits.minutes:
                raise AudioError(f"The sound is longer than {self.limits.minutes:g} minutes, the maximum of this page.")
        if model not in self.loaded:
            self.loaded[model] = load(model)
        return audio, self.loaded[model]

    def _new_picture(self) -> pathlib.Path:
        """Return the path of a new picture, and remove the oldest."""
        old = sorted(pathlib.Path(self.folder).glob("*.png"), key=lambda path: path.stat().st_mtime)
        for path in old[:-PICTURES]:
            path.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(suffix=".png", dir=self.folder)
        os.close(handle)
        return pathlib.Path(name)


@contextlib.contextmanager
def _shown_errors() -> Iterator[None]:
    """Show users' errors on the page as one line, with the name of the upload in place of its path."""
    try:
        yield
    except (ValueError, OSError) as error:
        import gradio

        line = re.sub(rf"{re.escape(tempfile.gettempdir())}/\S*/", "", str(error))
        raise gradio.Error(line, print_exception=False) from None
