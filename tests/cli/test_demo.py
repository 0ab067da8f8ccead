"""The web demo in headless Chromium, end to end: no requests to other hosts, limits, errors of one line."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import soundfile
from command_line import ONE_DEVICE

import ast_jax

pytestmark = pytest.mark.browser
SOUNDS = pathlib.Path(ast_jax.__file__).parent / "sounds"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]  # fmt: skip


@pytest.fixture(scope="module")
def address():
    """The page's URL, while the command runs."""
    command = [
        sys.executable,
        "-m",
        "ast_jax.cli.main",
        "demo",
        "--port",
        "0",
        "--max-megabytes",
        "2",
        "--max-minutes",
        "0.5",
    ]
    env = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        line = process.stdout.readline()
        try:
            yield re.match(r"(http://127\.0\.0\.1:\d+)  \(Ctrl-C ends it\)", line)[1]
        finally:
            process.terminate()


@pytest.fixture
def page(address):
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "expected Chromium; apt-get install chromium, or its path in the variable CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1200, "height": 1400}, permissions=["microphone"])
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#classify", timeout=60_000)
        yield page
        browser.close()
    hosts = {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))}
    assert hosts == {address.removeprefix("http://")}


def upload(page, path):
    page.set_input_files("#sound input[type=file]", path)
    page.wait_for_selector("#sound [aria-label='Play']", timeout=30_000)


def wait_for_message(page, text):
    page.wait_for_function(f"document.querySelector('#message').innerText.includes({text!r})", timeout=120_000)


def test_a_sound_is_classified_and_explained(page, tmp_path):
    sound = np.concatenate([ast_jax.read_audio(SOUNDS / f"{name}.flac") for name in ("speech", "music", "siren")])
    soundfile.write(tmp_path / "meeting.flac", sound, 16000)
    upload(page, tmp_path / "meeting.flac")
    page.click("#classify")
    wait_for_message(page, f"Classified {len(sound) / 16000:.2f} s in 8 windows.")
    page.wait_for_selector("#timeline img", timeout=60_000)
    labels = page.inner_text("#labels")
    assert labels.index("Speech") < labels.index("Siren")
    segments = page.inner_text("#segments")
    for segment in ast_jax.analyze(tmp_path / "meeting.flac").timeline():
        assert f"{segment.start:.2f}" in segments
        assert segment.label in segments
    page.click("#explain")
    wait_for_message(page, "Explained 2.58 s from ")
    page.wait_for_selector("#explanation img", timeout=60_000)
    for name in ("timeline", "explanation"):
        assert page.eval_on_selector(f"#{name} img", "image => image.complete && image.naturalWidth") > 900
    if "DEMO_SCREENSHOT" in os.environ:  # for docs/demo.png
        page.screenshot(path=os.environ["DEMO_SCREENSHOT"], full_page=True)


def test_a_recording(page):
    """Chromium's fake microphone beeps once a second."""
    page.click("#sound [aria-label='Record audio']")
    page.click("#sound .record-button, #sound button.record")
    page.wait_for_timeout(3000)
    page.click("#sound .stop-button, #sound button.stop")
    page.wait_for_selector("#sound [aria-label='Play']", timeout=30_000)
    page.click("#classify")
    wait_for_message(page, "Classified ")
    assert page.inner_text("#labels").split()[1] in ("Alarm", "Music", "Percussion", "Silence", "Noise")


@pytest.mark.parametrize("button", ["classify", "explain"])
def test_no_sound_yet(page, button):
    page.click(f"#{button}")
    page.wait_for_selector("text=Drop or record a sound first.", timeout=30_000)


def test_a_file_that_is_no_sound(page, tmp_path):
    (tmp_path / "text.wav").write_text("this is text")
    page.set_input_files("#sound input[type=file]", tmp_path / "text.wav")
    page.wait_for_timeout(2000)
    page.click("#classify")
    page.wait_for_selector("text=text.wav: not a readable sound file", timeout=30_000)
    assert "/tmp" not in page.inner_text("body")


def test_a_sound_that_is_too_long(page, tmp_path):
    soundfile.write(tmp_path / "long.flac", np.zeros(31 * 16000), 16000)
    upload(page, tmp_path / "long.flac")
    page.click("#classify")
    page.wait_for_selector("text=The sound is longer than 0.5 minutes, the maximum of this page.", timeout=30_000)


def test_an_upload_that_is_too_large(page, tmp_path):
    soundfile.write(tmp_path / "large.wav", np.zeros(1_200_000), 16000)
    page.set_input_files("#sound input[type=file]", tmp_path / "large.wav")
    page.wait_for_selector("text=/exceeds|too large|maximum/i", timeout=30_000)


def test_the_policy_goes_with_every_answer(address):
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
