"""ti-jax ui in headless Chromium, and its API without the page: pytest -m browser."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from children import environment
from PIL import Image

from ti_jax.config import ASSETS
from ti_jax.embeddings import Embedding
from ti_jax.startup import installed
from ti_jax.training.report import read_lines
from ti_jax.ui.runs import checkpoints_of, process_of, state_of

# Neither is imported here: these tests are rarely chosen.
missing = [name for name in ("gradio", "playwright") if not installed(name)]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PICTURES = sorted(map(str, (ASSETS / "concepts" / "cleo").glob("*.png")))
# Few samples and few steps of the sampler; the programs are the same in every test, so that they are compiled once.
QUICK = 'validation_inference_steps: 2\nlogging_steps: 2\noverview_prompts: ["a portrait of {}"]'
PATIENCE = 120_000  # milliseconds; on two busy cores


class Page:
    """A server with a folder of runs."""

    def __init__(self, folder):
        self.root = folder / "runs"
        command = [sys.executable, "-m", "ti_jax", "ui", "--output_dir", str(self.root), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=folder)
        line = self.process.stdout.readline()
        self.url = re.match(r"(http://127\.0\.0\.1:\d+) ", line)[1]

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def call(self, name, *data):
        """What the API answers: ("complete", values) or ("error", the error's words)."""
        event = json.loads(self.request(f"/gradio_api/call/{name}", {"data": data}))["event_id"]
        answer = self.request(f"/gradio_api/call/{name}/{event}").decode()
        kind, values = re.findall(r"event: (\w+)\ndata: (.*)\n", answer)[-1]
        return kind, json.loads(values)

    def request(self, path, data=None, **headers):
        body = None if data is None else json.dumps(data).encode()
        headers = {"Content-Type": "application/json", **headers}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers), timeout=60) as answer:
            return answer.read()

    def refuses(self, path, data=None, **headers):
        """The status of a request that is refused."""
        with pytest.raises(urllib.error.HTTPError) as refused:
            self.request(path, data, **headers)
        refused.value.close()
        return refused.value.code

    def uploaded(self, path):
        """A file as the page hands it over once it has been dropped there."""
        body = b"--x\r\nContent-Disposition: form-data; name=files; filename=%s\r\n\r\n" % Path(path).name.encode()
        request = urllib.request.Request(
            f"{self.url}/gradio_api/upload", body + Path(path).read_bytes() + b"\r\n--x--\r\n",
            {"Content-Type": "multipart/form-data; boundary=x"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            return given(json.loads(answer.read())[0])


def given(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


@contextlib.contextmanager
def serving(folder):
    """Starts pages for the same folder; at the end no server is left and no run, however the test ended."""
    pages = []

    def start():
        pages.append(Page(folder))
        return pages[-1]

    try:
        yield start
    finally:
        for page in pages:
            page.end()
        for run in (folder / "runs").glob("*"):
            if (number := process_of(run)) is not None:
                os.kill(number, signal.SIGKILL)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served")) as start:
        yield start()


@pytest.fixture
def serve(tmp_path):
    with serving(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def shown(chromium, url):
    """The page in a browser that is a user's: nothing may be asked of another machine."""
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    elsewhere = []
    tab.on("request", lambda each: elsewhere.append(each.url) if not re.match(rf"{url}|data:|blob:", each.url) else 0)
    tab.set_default_timeout(PATIENCE)
    tab.goto(url)
    tab.wait_for_selector("#learn", state="attached")  # not seen where a run goes on: the page opens at its second step
    try:
        yield tab
    finally:
        tab.close()
    assert elsewhere == []


def ask(tab, word, pictures=PICTURES, steps=6, every=2):
    """Fill in the first step of the page."""
    tab.set_input_files("#pictures input[type=file]", pictures)
    tab.wait_for_selector("#sheet img")
    tab.fill("#word textarea", word)
    tab.fill("#steps textarea", str(steps))
    tab.click("#more button")
    tab.fill("#batch textarea", "2")
    tab.fill("#every textarea", str(every))
    tab.fill("#further textarea", QUICK)


def learn(tab):
    """Start the run; an error is shown at once."""
    tab.click("#learn")
    tab.wait_for_selector("#state .status, .toast-body")
    assert tab.locator(".toast-body").all_inner_texts() == []


def to_step(tab, name):
    tab.get_by_role("tab", name=name).click()


def test_from_pictures_to_a_saved_file(chromium, served, tmp_path):
    with shown(chromium, served.url) as tab:
        ask(tab, "<first>")
        assert "4 pictures: all can be learned from" in tab.inner_text("#remarks")
        learn(tab)
        for part in ("#curve svg", "#progress img", "#state .finished", "#overview img"):
            tab.wait_for_selector(part)
        assert "<first>" in tab.inner_text("#state") and "step 6 of 6" in tab.inner_text("#state")
        to_step(tab, "3 Try")
        tab.fill("#try-count input[type=number]", "1")
        tab.click("#draw")
        tab.wait_for_selector("#drawn img")
        to_step(tab, "4 Save")
        tab.click("#format label:has-text('ComfyUI')")
        tab.click("#save")
        with tab.expect_download() as found:
            tab.click("#files a")
        found.value.save_as(tmp_path / "first.safetensors")
        assert "ti-jax infer" in tab.inner_text("#how")
    folder = served.root / "first"
    saved, learned = (Embedding.load(each) for each in (tmp_path / "first.safetensors", folder))
    assert saved.vectors["text_encoder"].tolist() == learned.vectors["text_encoder"].tolist()
    # An ordinary run folder.
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "report.html", "metrics.jsonl", "overview.png", "checkpoints", "pictures"} <= names


def test_an_invalid_picture_is_named_and_starts_nothing(chromium, served, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("not a picture")
    with shown(chromium, served.url) as tab:
        ask(tab, "<invalid>", [*PICTURES[:2], str(broken)])
        assert "broken.jpg cannot be learned from" in tab.inner_text("#remarks")
        tab.click("#learn")
        tab.wait_for_selector(".toast-body:has-text('broken.jpg: cannot be learned from; remove it')")
    assert not (served.root / "invalid").exists()


def test_an_error_of_the_run_is_on_the_page(chromium, served):
    with shown(chromium, served.url) as tab:
        ask(tab, "<wrong>")
        tab.fill("#initializer textarea", "xylophone")
        learn(tab)
        tab.wait_for_selector("#state .error:has-text('xylophone')")
    assert state_of(served.root / "wrong").status == "failed"


def test_a_reload_and_kills_lose_nothing(chromium, serve):
    """Of the page, of its server, and of the process that learns; then the run resumes from the page."""
    page = serve()
    folder = page.root / "long"
    with shown(chromium, page.url) as tab:
        ask(tab, "<long>", steps=5000, every=10)
        learn(tab)
        tab.wait_for_selector("#curve svg")
        tab.reload()
        tab.wait_for_selector("#state .learning", state="attached")
        assert "<long>" in tab.text_content("#state")
    process = process_of(folder)
    page.end()
    before = state_of(folder)
    assert before.process == process
    page = serve()
    with shown(chromium, page.url) as tab:
        wait_for(lambda: state_of(folder).step > before.step and checkpoints_of(folder))
        tab.wait_for_selector("#state .learning", state="attached")
        os.kill(process, signal.SIGKILL)
        tab.wait_for_selector("#state .stopped", state="attached")
        last, logged = checkpoints_of(folder)[-1], state_of(folder).step
        to_step(tab, "2 Learn")
        tab.fill("#until textarea", "4000")
        tab.click("#resume")
        wait_for(lambda: state_of(folder).running and state_of(folder).step > logged)
        tab.click("#stop:not([disabled])")
        tab.wait_for_selector("#state .stopped")
        assert "stopped at step" in tab.inner_text("#state") and "of 4000" in tab.inner_text("#state")
    ended = state_of(folder)
    assert checkpoints_of(folder)[-1] == ended.step > logged >= last > 0 and not list(folder.glob("previous-*"))
    updates = [record["step"] for record in read_lines(folder / "metrics.jsonl") if "losses" in record]
    count = sum(len(record.get("losses", ())) for record in read_lines(folder / "metrics.jsonl"))
    assert updates == sorted(set(updates)) and updates[-1] == count == ended.step
    assert int(Embedding.load(folder).metadata["steps"]) == ended.step


def wait_for(holds):
    for _ in range(PATIENCE // 300):
        if holds():
            return
        time.sleep(0.3)
    raise AssertionError("it did not come")


# -- the API, which takes calls that the page does not make


def test_no_call_reads_a_file_that_was_not_chosen(served, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64), "red").save(secret)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.yaml").write_text("placeholder_token: <x>\n")
    inside = served.root / "links"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("placeholder_token: <x>\n")
    (inside / "report.html").symlink_to("/etc/passwd")
    (inside / "learned_embeds.safetensors").symlink_to(secret)
    (served.root / "away").symlink_to(outside)
    picture = served.uploaded(PICTURES[0])

    def settings(model="embedded model (small, for a first try)", further="", word="<api>"):
        return [model, word, "", "object", "2", "", "", "2", None, "", "", further]

    def captions(*rows):
        return {"headers": ["picture", "caption"], "data": list(rows), "metadata": None}

    label, embedded = "the word as it is now", settings()[0]
    way_up = str(Path(picture["path"]).parent) + "/../../../../etc/passwd"
    refused = {
        ("look", "a picture"): ([[given(secret)], embedded], "was not uploaded by a user"),
        ("look", "/etc/passwd"): ([[given("/etc/passwd")], embedded], "was not uploaded by a user"),
        ("look", "a way up"): ([[given(way_up)], embedded], "was not uploaded by a user"),
        ("look", "a model"): ([[picture], "/etc"], "neither a model of the list nor a hub id"),
        ("learn", "a picture"): ([[given(secret)], captions(), *settings()], "was not uploaded by a user"),
        ("learn", "a caption"): ([[picture], captions(["../../x", "a"]), *settings()], "no such picture"),
        ("learn", "a model"): ([[picture], captions(), *settings(model=str(tmp_path))], "neither a model of the list"),
        ("learn", "templates"): ([[picture], captions(), *settings(further="templates: /etc/passwd")], "cannot be"),
        ("learn", "an output"): ([[picture], captions(), *settings(further=f"output_dir: {tmp_path}/x")], "cannot be"),
        ("report", "a run above"): ([".."], "no run of that name"),
        ("report", "a run elsewhere"): ([str(outside)], "no run of that name"),
        ("report", "a link to a run"): (["away"], "no run of that name"),
        ("stop", "a run elsewhere"): (["../runs/links"], "no run of that name"),
        ("resume", "a run elsewhere"): ([str(outside), ""], "no run of that name"),
        ("save", "a word by its path"): (["links", "learned_embeds.safetensors", "diffusers"], "not a word of this"),
        ("save", "a link"): (["links", label, "diffusers"], "no such file in the folder of the run"),
        ("draw", "a link"): (["links", "{}", label, "nothing else", False, "", 1, 0, "", "", ""], "no such file"),
        ("draw", "a run"): (["../x", "{}", label, "nothing else", False, "", 1, 0, "", "", ""], "no run of that name"),
    }  # fmt: skip
    for (name, what), (data, message) in refused.items():
        kind, said = served.call(name, *data)
        assert kind == "error" and message in str(said), (name, what, kind, said)
    kind, (html, *_) = served.call("report", "links")
    assert kind == "complete" and "root:" not in html and "There is none yet" in html
    for path in (secret, "/etc/passwd", served.root / "links" / "config.yaml", inside / "report.html"):
        for route in ("file=", "file/"):
            assert served.refuses(f"/gradio_api/{route}{path}") in (403, 404)
    assert not (served.root / "api").exists() and not (tmp_path / "x").exists()
    assert served.call("look", [picture], embedded)[0] == "complete"  # the call itself is right


def test_other_sites_are_not_answered(served):
    """A site whose name leads to 127.0.0.1, and one that has its visitor's browser call the API."""
    assert served.refuses("/", Host="elsewhere.example") == 400
    assert served.refuses("/gradio_api/call/watch", {"data": [None]}, Origin="https://elsewhere.example") == 403


def test_bound_elsewhere_is_a_warning(tmp_path, nothing_is_ignored):
    command = [sys.executable, "-m", "ti_jax", "ui", "--output_dir", str(tmp_path), "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout.readline().startswith("http://0.0.0.0:")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.readline().startswith("warning: --host 0.0.0.0: whoever reaches this machine")
