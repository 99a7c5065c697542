"""The explain page in a real browser: what moves when the scrubber moves, and that nothing else happens.

Chromium is driven over its DevTools protocol; without a browser these tests are skipped.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import fake_generation
import pytest

from interp.explain import Explanation, describe
from interp.panels import Panel, choose

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BINARY = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BINARY is None, reason=f"no browser: none of {', '.join(NAMES)} is on the path"),
]

HOSTILE = "<script>alert(1)</script><img src=x onerror='document.title=\"run\"'></script>"
WORDS = [*(f"▁w{n}" for n in range(80)), "\n", HOSTILE]


class Browser:
    """A page of a headless Chromium, and all that it logged and asked for."""

    def __init__(self, profile):
        import websocket

        # A session of its own, so that it can be ended with all its children.
        self.process = subprocess.Popen(
            [BINARY, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            port = self._wait(lambda: (Path(profile) / "DevToolsActivePort").read_text().split()[0])
            target = self._wait(lambda: self._page(port))
            self.socket = websocket.create_connection(target, suppress_origin=True, timeout=60)
        except BaseException:
            self._kill()
            raise
        self.count, self.events = itertools.count(1), []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    @staticmethod
    def _page(port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            return next(t["webSocketDebuggerUrl"] for t in json.load(answer) if t["type"] == "page")

    @staticmethod
    def _wait(attempt, seconds=60):
        end = time.monotonic() + seconds
        while True:
            try:
                return attempt()
            except (OSError, IndexError, StopIteration):
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def __call__(self, method, session=None, **arguments):
        number = next(self.count)
        command = {"id": number, "method": method, "params": arguments}
        self.socket.send(json.dumps(command | ({"sessionId": session} if session else {})))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def js(self, expression, session=None):
        answer = self("Runtime.evaluate", session, expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, path, width=1280, dark=False, address=""):
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url="about:blank")
        self.events.clear()
        self("Page.navigate", url=f"{path.as_uri()}{address}")
        self._wait(lambda: self._ready(path))

    def _ready(self, path):
        if not self.js(f"document.readyState === 'complete' && location.pathname === {json.dumps(str(path))}"):
            raise OSError("still loading")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            text = {"text": " "} if key == " " and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key,
                 windowsVirtualKeyCode=KEYS.get(key, 0), **text)  # fmt: skip

    def point(self, selector, click=False, across=0.5, down=0.5):
        """Moves the mouse to a place within an element, and clicks there."""
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            f"return [b.left + b.width * {across}, b.top + b.height * {down}]; }})()"
        )
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def requests(self):
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if url != "about:blank"]

    def complaints(self):
        """Everything said on the console, every exception, every blocked script or request, every dialog."""
        said = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"}
        return [e for e in self.events if e.get("method") in said]

    def close(self):
        with contextlib.suppress(Exception):  # the connection may end before the answer comes
            self("Browser.close")
        self.socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Enter": 13, " ": 32}


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("websocket", reason="drives the browser; it is in the `test` extra")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.close()


def explanation(prompt="a prompt", extra=(), **options):
    """Two blocks of 12 positions; the answer has 18 words."""
    fake = fake_generation.bundle(WORDS, canvas_length=12)
    ids = [3 + (7 * n) % 80 for n in range(18)]
    run = fake_generation.generation(fake, ids[:4], ids, **{"steps": 9, "seed": 5, "max_denoising_steps": 20} | options)
    panels = (*choose(None), *extra)
    drawn = [{"name": p.name, "title": p.title, "place": p.place, "data": p.data(fake, run)} for p in panels]
    return Explanation(describe(fake, run, prompt=prompt) | {"panels": drawn}, panels)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(data, path) of a page."""
    made = explanation()
    path, _ = made.save(tmp_path_factory.mktemp("page") / "report.html")
    return made.data, path


@pytest.fixture
def page(browser, saved):
    """The browser at a fresh copy of the page; nothing may be logged or asked for by the end of a test."""
    browser.open(saved[1])
    yield browser
    browser.js("new Promise((done) => setTimeout(done, 20))")
    assert browser.complaints() == []
    assert all(url.startswith("file:") for url in browser.requests()) and len(browser.requests()) == 1


CHIPS = "[...document.querySelectorAll('.board .chip')]"


def chips(page):
    return page.js(f"{CHIPS}.map((chip) => chip.textContent)")


def flagged(page, name):
    return page.js(f"{CHIPS}.flatMap((chip, i) => chip.classList.contains('{name}') ? [i] : [])")


def texts(data, ids):
    return [data["vocabulary"][str(i)] for i in ids]


def slide(page, step):
    """Moves the scrubber as a user's drag does."""
    page.js(
        "((range) => { range.value = %d; range.dispatchEvent(new Event('input')); })"
        "(document.getElementById('step'))".replace("%d", str(step))
    )


def label(page):
    return page.js("document.querySelector('.step-label').textContent")


def state(page):
    return page.js("report.state")


def test_the_scrubber_shows_the_canvas_of_every_step(page, saved):
    data, _ = saved
    block = data["blocks"][0]
    n = block["num_steps"]
    assert label(page) == f"step {n} / {n}"
    for step in range(n + 1):
        slide(page, step)
        assert label(page) == f"step {step} / {n}"
        assert chips(page) == texts(data, block["tokens"][step - 1] if step else block["start"])
        accepted = block["accepted"][step - 1] if step else [0] * 12
        before = block["accepted"][step - 2] if step > 1 else [0] * 12
        assert flagged(page, "accepted") == [i for i in range(12) if accepted[i]]
        assert flagged(page, "noise") == [i for i in range(12) if not accepted[i]]
        assert flagged(page, "dropped") == [i for i in range(12) if before[i] and not accepted[i]]
    assert sum(block["unaccepts"]) > 0  # otherwise the last line above says little


def test_changed_marks_only_what_the_model_changed(page, saved):
    block = saved[0]["blocks"][0]
    for step in range(1, block["num_steps"] + 1):
        slide(page, step)
        now, before = block["tokens"][step - 1], block["tokens"][step - 2] if step > 1 else block["start"]
        accepted = block["accepted"][step - 1]
        assert flagged(page, "changed") == [i for i in range(12) if accepted[i] and now[i] != before[i]]


def test_the_argmax_view(page, saved):
    data, _ = saved
    block = data["blocks"][0]
    page.js("document.querySelector('input[value=argmax]').click()")
    for step in (1, block["num_steps"]):
        slide(page, step)
        assert chips(page) == texts(data, block["argmax"][step - 1])
    assert flagged(page, "noise") == []


def test_blocks_are_chosen(page, saved):
    data, _ = saved
    page.js(
        "((list) => { list.selectedIndex = 1; list.dispatchEvent(new Event('change')); })"
        "(document.querySelector('select'))"
    )
    block = data["blocks"][1]
    assert label(page) == f"step {block['num_steps']} / {block['num_steps']}"
    assert chips(page) == texts(data, block["tokens"][-1])
    assert flagged(page, "past") == list(range(7, 12))


def test_keys(page, saved):
    n = saved[0]["blocks"][0]["num_steps"]
    page.key("Home")
    assert state(page)["step"] == 0
    page.key("ArrowRight")
    assert label(page) == f"step 1 / {n}"
    page.js("document.querySelector('.board .chip').focus()")
    page.key("ArrowRight")
    page.key("ArrowDown")
    assert (state(page)["position"], state(page)["step"]) == (1, 2)
    assert page.js("document.activeElement.dataset.position") == "1"
    page.key("Enter")
    page.js("document.querySelector('[data-map=entropy]').focus()")
    for key in ("ArrowUp", "ArrowUp", "End"):
        page.key(key)
    assert (state(page)["position"], state(page)["step"]) == (11, 0)


@pytest.mark.heavy
def test_playing_runs_to_the_end_and_stops(page, saved):
    n = saved[0]["blocks"][0]["num_steps"]
    page.point(".play", click=True)
    assert page.js("document.querySelector('.play').getAttribute('aria-label')") == "Pause"
    assert state(page)["step"] < n
    done = (
        "new Promise((done) => report.on((now) => { if (now.step === report.block().num_steps) setTimeout(done, 0); }))"
    )
    page.js(done)
    assert page.js("document.querySelector('.play').getAttribute('aria-label')") == "Play the steps"


def test_pointing_shows_a_position_and_a_click_pins_it(page, saved):
    data, _ = saved
    block = data["blocks"][0]
    slide(page, 3)
    page.point(".chip[data-position='5']")
    rows = "[...document.querySelectorAll('.candidates tbody th')].map((cell) => cell.textContent)"
    assert page.js(rows) == [*texts(data, block["top_ids"][2][5]), "all others"]
    history = "[...document.querySelectorAll('.history tbody tr')].map((row) => row.cells[1].textContent)"
    assert page.js(history) == texts(data, [block["start"][5], *(row[5] for row in block["tokens"])])
    page.point(".chip[data-position='5']", click=True)
    page.point(".chip[data-position='8']")
    assert (state(page)["position"], state(page)["pinned"]) == (5, True)
    page.point(".chip[data-position='8']", click=True)
    assert (state(page)["position"], state(page)["pinned"]) == (8, True)
    page.point(".chip[data-position='8']", click=True)
    assert state(page)["pinned"] is False


@pytest.mark.parametrize("name", ["entropy", "accepted"])
def test_a_click_on_a_map_goes_to_its_cell(page, saved, name):
    n = saved[0]["blocks"][0]["num_steps"]
    page.point(f"[data-map={name}]", click=True, across=7.5 / 12, down=3.5 / n)
    now = state(page)
    assert (now["position"], now["step"], now["pinned"]) == (7, 4, True)
    assert label(page) == f"step 4 / {n}"


def test_the_maps_show_the_numbers(page, saved):
    """The colour of a cell of the entropy map is that of its entropy; of the other, whether it was accepted."""
    block = saved[0]["blocks"][0]
    n = block["num_steps"]
    pixel = """((name, i, c) => { const map = document.querySelector(`[data-map=${name}] canvas`);
      const one = new OffscreenCanvas(1, 1).getContext('2d');
      const x = Math.floor((c + 0.5) * map.width / 12), y = Math.floor((i + 0.75) * map.height / STEPS);
      one.drawImage(map, x, y, 1, 1, 0, 0, 1, 1);
      return [...one.getImageData(0, 0, 1, 1).data]; })""".replace("STEPS", str(n))
    wanted = """((text) => { const one = new OffscreenCanvas(1, 1).getContext('2d');
      one.fillStyle = text; one.fillRect(0, 0, 1, 1); return [...one.getImageData(0, 0, 1, 1).data]; })"""
    for i, c in itertools.product(range(n), range(12)):
        if block["settled"][c] in (i + 1, i + 2):
            continue  # the settled line may pass
        shown = page.js(f"{pixel}('entropy', {i}, {c})")
        assert shown == page.js(f"{wanted}(report.entropyColour({block['entropy'][i][c]}))")
    full = page.js(f"{wanted}(report.cssColour('--field'))")
    cells = [[page.js(f"{pixel}('accepted', {i}, {c})") == full for c in range(12)] for i in range(n)]
    assert cells == [[bool(yes) for yes in row] for row in block["accepted"]]


def test_tables_hold_the_numbers(page, saved):
    data, _ = saved
    block = data["blocks"][0]
    page.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.js("new Promise((done) => setTimeout(done, 50))")
    table = (
        "[...document.querySelectorAll('details')].map((one) => [...one.querySelectorAll('tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent)))"
    )
    positions, steps = page.js(table)
    assert [row[1] for row in positions] == texts(data, block["committed"])
    assert [int(row[2]) for row in positions] == block["settled"]
    assert [row[3] for row in positions] == ["never" if s is None else str(s) for s in block["first_accepted"]]
    assert [int(row[4]) for row in positions] == block["unaccepts"]
    assert [int(row[3]) for row in steps] == block["accepted_count"]


@pytest.mark.parametrize("dark", [False, True])
def test_the_ramp_is_monotone_in_lightness(browser, saved, dark):
    browser.open(saved[1], dark=dark)
    ramp = browser.js("Array.from({length: 101}, (_, i) => Number(report.ramp(i / 100).match(/oklch\\(([\\d.]+)/)[1]))")
    rising = sorted(ramp)
    assert ramp == (rising if dark else rising[::-1]) and rising[-1] - rising[0] > 0.5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(browser, saved, width, dark):
    browser.open(saved[1], width=width, dark=dark)
    assert browser.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_an_address_leads_to_a_moment(browser, saved):
    browser.open(saved[1], address="#block=2&step=3&position=4&show=argmax")
    now = browser.js("report.state")
    assert (now["block"], now["step"], now["position"], now["pinned"], now["shown"]) == (1, 3, 4, True, "argmax")
    browser.open(saved[1], address="#block=99&step=1e9&position=-4&show=<b>")
    n = len(saved[0]["blocks"])
    assert browser.js("report.state.block") == n - 1 and browser.complaints() == []


def test_hostile_text_is_shown_and_not_run(browser, tmp_path):
    fake = fake_generation.bundle(WORDS, canvas_length=12, name=HOSTILE)
    evil = fake.tokenizer.id(HOSTILE)
    run = fake_generation.generation(fake, [evil, 4], [evil, 5, evil], steps=6, max_denoising_steps=20)
    run.texts = [HOSTILE]
    panels = choose(None)
    drawn = [{"name": p.name, "title": p.title, "place": p.place, "data": None} for p in panels]
    path, _ = Explanation(describe(fake, run, prompt=HOSTILE) | {"panels": drawn}, panels).save(tmp_path / "evil.html")
    browser.open(path)
    title = browser.js("document.title")
    assert browser.js("[...document.querySelectorAll('.said pre')].map((e) => e.textContent)") == [HOSTILE, HOSTILE]
    assert browser.js("document.querySelector('.eyebrow b').textContent") == HOSTILE
    browser.js("report.set({step: 99, position: 0, pinned: true})")
    assert chips(browser)[0] == HOSTILE
    browser.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    browser.js("new Promise((done) => setTimeout(done, 100))")
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.js("document.title") == title != "run"
    assert browser.complaints() == [] and len(browser.requests()) == 1


def test_the_policy_stops_what_escaping_would_miss(browser, saved):
    browser.open(saved[1])
    browser.js("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    browser.js(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 2'}))"
    )
    browser.js("fetch('https://example.invalid/').catch(() => {})")
    assert browser.js("document.title") not in ("1", "2")
    assert "Content Security Policy" in json.dumps(browser.complaints())


def test_a_panel_of_ones_own(browser, tmp_path):
    """One Python function and one script: it gets its data, follows the state, moves it. A broken one stays alone."""
    (tmp_path / "mine.js").write_text(
        'report.panel("mine", (element, view) => {'
        " view.on((now) => { element.textContent = `${view.data.word} ${now.step}`; });"
        " element.onclick = () => view.set({step: 1}); });"
    )
    (tmp_path / "bad.js").write_text('report.panel("bad", () => { throw new Error("no data"); });')
    extra = (
        Panel(name="bad", title="Bad", script=tmp_path / "bad.js"),
        Panel(
            name="mine",
            title="Mine <b>",
            script=tmp_path / "mine.js",
            data=lambda b, g: {"word": g.texts[0][:2]},
            place="foot",
        ),
    )
    path, _ = explanation(extra=extra).save(tmp_path / "report.html")
    browser.open(path)
    body = "document.querySelector('#panel-mine .body')"
    browser.js("report.set({step: 2})")
    assert browser.js(f"{body}.textContent") == "w0 2"
    browser.js(f"{body}.click()")
    assert browser.js(f"{body}.textContent") == "w0 1" and label(browser).startswith("step 1 /")
    assert browser.js("document.querySelector('#panel-mine h2').textContent") == "Mine <b>"
    assert browser.js("document.querySelector('#panel-bad .body').textContent") == "This panel failed: no data"


def test_the_lens_shows_every_layer(browser, tmp_path):
    """At the step and position chosen: the layers' tokens, colours by the final token's probability, shares by step."""
    fake = fake_generation.bundle(WORDS, canvas_length=12)
    run = fake_generation.generation(fake, [3, 4], [5, 6, 7, 8], steps=9, seed=5, max_denoising_steps=20)
    n, final = int(run.trajectory.num_steps[0, 0]), run.trajectory.committed[0, 0].tolist()
    top = [[[9 + 3 * i + 10 * layer] * 12 for layer in range(2)] for i in range(n)]
    for row in top:
        row[1][2] = final[2]
    probs = [[[10 * layer + i] * 12 for layer in range(2)] for i in range(n)]
    block = {"top": top, "top_probs": probs, "final_probs": probs, "share": [[i / n, None] for i in range(n)]}
    words = {str(token): f"t{token}" for row in top for token in (row[0][0], row[1][0])}
    made = {"method": "plain", "layers": [0, 7], "vocabulary": words, "blocks": [block]}
    panels = [dataclasses.replace(p, data=lambda b, g: made) if p.name == "lens" else p for p in choose(None)]
    drawn = [{"name": p.name, "title": p.title, "place": p.place, "data": p.data(fake, run)} for p in panels]
    path, _ = Explanation(describe(fake, run, prompt="x") | {"panels": drawn}, tuple(panels)).save(tmp_path / "r.html")
    browser.open(path)
    slide(browser, 3)
    browser.point("[data-map=lens]", click=True, across=4.5 / 12)
    rows = browser.js(
        "[...document.querySelectorAll('.lens-layers tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert rows == [["7", "t25", "12%", "12%"], ["0", "t15", "2%", "2%"]] and state(browser)["position"] == 4
    pixel = """((x, y) => { const map = document.querySelector('[data-map=lens] canvas');
      const one = new OffscreenCanvas(1, 1).getContext('2d');
      one.drawImage(map, Math.floor(x * map.width), Math.floor(y * map.height), 1, 1, 0, 0, 1, 1);
      return [...one.getImageData(0, 0, 1, 1).data]; })"""
    wanted = """((text) => { const one = new OffscreenCanvas(1, 1).getContext('2d');
      one.fillStyle = text; one.fillRect(0, 0, 1, 1); return [...one.getImageData(0, 0, 1, 1).data]; })"""
    assert browser.js(f"{pixel}(8.5 / 12, 0.75)") == browser.js(f"{wanted}(report.ramp(0.98))")
    assert browser.js(f"{pixel}(8.5 / 12, 0.25)") == browser.js(f"{wanted}(report.ramp(0.88))")
    assert browser.js(f"{pixel}(2.5 / 12, 0.25)") == browser.js(f"{wanted}(report.inkOn(0.88))")  # the dot
    browser.point("[data-map=lens-share]", click=True, across=0.5 / n)
    assert state(browser)["step"] == 1
    slide(browser, 0)
    assert "random start" in browser.js("document.querySelector('#panel-lens').textContent")
    assert browser.complaints() == []


def test_the_patch_map_shows_its_numbers(browser, tmp_path):
    """Under the pointer and the arrow keys; the table is sorted by size; a step between two swept ones shows the one before."""
    fake = fake_generation.bundle(WORDS, canvas_length=12)
    run = fake_generation.generation(fake, [3, 4], [5, 6, 7, 8], steps=9, seed=5, max_denoising_steps=20)
    made = {
        "against": "other", "answer": HOSTILE, "steps": [1, 4], "layers": [0, 7], "differ": [1],
        "places": {"prompt": [1], "canvas": [0, 1]}, "prompt_ids": [[4, 9]], "donor_ids": [5, 11],
        "vocabulary": {"9": "nine", "11": "eleven"},
        "recovery": {"prompt": [[[80], [3]], [[10], [2]]], "canvas": [[[0, -60], [1, 99]], [[0, 20], [1, 95]]]},
    }  # fmt: skip
    panels = [*choose(["canvas"]), Panel(name="patch", title="Patches", script="patch.js", data=lambda b, g: made)]
    drawn = [{"name": p.name, "title": p.title, "place": p.place, "data": p.data(fake, run)} for p in panels]
    path, _ = Explanation(describe(fake, run, prompt="x") | {"panels": drawn}, tuple(panels)).save(tmp_path / "r.html")
    browser.open(path)
    slide(browser, 3)
    browser.point("[data-map=patch]", click=True, across=0.5 / 3, down=0.75)
    told = "document.querySelector('#panel-patch .map-readout').textContent"
    assert browser.js(told) == "step 1 · layer 0 · prompt token 1 ▁w1 (there nine) · 80%"
    for key in ("ArrowRight", "ArrowRight"):
        browser.js(
            "document.querySelector('[data-map=patch]').dispatchEvent("
            f"new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))"
        )
    assert "layer 0 · canvas position 1" in browser.js(told) and browser.js(told).endswith("(there eleven) · -60%")
    shares = "[...document.querySelectorAll('.patch-places tbody tr')].map((r) => r.cells[2].textContent)"
    assert browser.js(shares) == ["99%", "80%", "1%"]
    slide(browser, 6)
    assert browser.js(shares) == ["95%", "10%", "1%"] and browser.complaints() == []


def test_without_candidates(browser, tmp_path):
    path, _ = explanation(top_k=0).save(tmp_path / "report.html")
    browser.open(path)
    assert "top_k = 0" in browser.js("document.querySelector('.candidates').textContent")
    assert browser.complaints() == []


def test_the_notebook_frame_works(browser, tmp_path):
    """In a sandboxed frame without an origin the page still draws and logs nothing."""
    path = tmp_path / "cell.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{explanation()._repr_html_()}", encoding="utf-8")
    browser.open(path)
    frames = [t for t in browser("Target.getTargets")["targetInfos"] if t["type"] == "iframe"]
    if not frames:
        pytest.skip("this browser keeps sandboxed frames in the page's process")
    session = browser("Target.attachToTarget", targetId=frames[0]["targetId"], flatten=True)["sessionId"]
    for domain in ("Runtime", "Log"):
        browser(f"{domain}.enable", session)
    assert browser.js("document.querySelectorAll('.board .chip').length", session) == 12
    browser.js("document.querySelector('[aria-label=\"Previous step\"]').click()", session)
    step, end = browser.js("[report.state.step, report.block().num_steps]", session)
    assert step == end - 1
    assert browser.complaints() == []
