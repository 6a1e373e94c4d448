"""What TensorBoard shows of two runs in a real browser: Debian's Chromium, without a window.

This program draws the picture in docs/files.md, of the runs in logs/ of this folder:

    python3 tests/test_tensorboard.py img/tensorboard.png
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from programs import ROOT, TINY, environment, events, run, scalars
from selenium import webdriver
from selenium.common import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

SWITCHES = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    " disable-component-update disable-sync window-size=1280,943"  # the page gets 1280x800 of it
).split()
# All elements in `root` that match, those in shadow trees too.
FIND = """const find = (root, selector) => [...root.querySelectorAll('*')].flatMap(element => [
  ...(element.matches(selector) ? [element] : []),
  ...(element.shadowRoot ? find(element.shadowRoot, selector) : [])]);
"""


@contextmanager
def tensorboard(folder):
    """Serves logs/ of `folder` with the command of `make tensorboard`; gives the address."""
    recipe = ["make", "--no-print-directory", "-n", "tensorboard"]
    made = subprocess.run(recipe, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    program, *args = made.splitlines()[-1].split()
    assert program.endswith("bin/tensorboard")
    command = [sys.executable, "-m", "tensorboard.main", *args, "--port", "0"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment(), **pipes) as server:
        try:
            for line in server.stderr:
                if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    break
            yield found[0]
        finally:
            server.terminate()


@contextmanager
def chromium():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for switch in (*SWITCHES, f"user-data-dir={profile}"):
            options.add_argument(f"--{switch}")
        browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            yield browser
        finally:
            browser.quit()


def shown(browser, address, selector, value, is_whole):
    """The JavaScript `value` of each `element` that matches, as soon as `is_whole` of the list."""
    found = []

    def look(_):
        script = f"{FIND} return find(document, arguments[0]).map(element => {value})"
        found[:] = browser.execute_script(script, selector)
        return is_whole(found)

    browser.get("about:blank")  # another dashboard at the same address would not load anew
    browser.get(address)
    try:
        WebDriverWait(browser, 60).until(look)
    except TimeoutException:
        pytest.fail(f"{address}: {selector} shows {found}")
    return found


def charts(browser, address, tags, count):
    """{tag: the colors of the lines} of the scalars' charts, `count` lines in each."""
    lines = "find(element.shadowRoot, 'path.line[stroke]').map(line => line.getAttribute('stroke'))"
    found = shown(
        browser,
        f"{address}#scalars&tagFilter={tags}",
        "tf-scalar-card",
        f"[element.tag, {lines}]",
        lambda cards: cards and all(len({*colors}) == count for _, colors in cards),
    )
    return dict(found)


@pytest.fixture(scope="module")
def browser():
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        if os.environ.get("RESCALEVIT_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def runs(browser, tmp_path_factory):
    """{norm type: TensorBoard's folder} of two runs in one logs/."""
    folder = tmp_path_factory.mktemp("runs")
    for norm_type in ("LN", "Rescale"):
        flags = f"--model_type ViT-64x4_4 --log_signal --norm_type {norm_type}"
        run([*TINY, *flags.split()], folder)
    return {name: next(folder.glob(f"logs/tiny*_norm_{name}_*")) for name in ("LN", "Rescale")}


@pytest.fixture(scope="module")
def address(runs):
    with tensorboard(runs["LN"].parents[1]) as address:
        yield address


def test_scalars_of_two_runs_on_one_chart(browser, address, runs):
    """Truth: the last loss of each run's events."""
    assert "train/loss" in charts(browser, address, "train", len(runs))
    (card,) = shown(
        browser,
        f"{address}?tagFilter=train/loss%24#timeseries",
        "scalar-card",
        "element.innerText.split('\\n').map(text => text.trim())",
        lambda cards: cards and all(path.name in cards[0] for path in runs.values()),
    )
    assert card[:2] == ["train", "/loss"]
    for path in runs.values():
        step, loss = scalars(path)["train/loss"][-1]
        row = [text for text in card[card.index(path.name) :] if text]
        assert row[2:4] == [f"{loss:.5g}", str(step)]


def test_the_table_of_hyperparameters(browser, address, runs):
    """It begins with what differs. Truth: the flags; the best accuracy of each run's events."""
    cells = shown(
        browser,
        f"{address}#hparams",
        "vaadin-grid-cell-content",
        "element.innerText.trim()",
        lambda cells: all(path.name in cells for path in runs.values()),
    )
    assert cells[:3] == ["Trial ID", "Show Metrics", "norm_type"]
    for norm_type, path in runs.items():
        row = dict(zip(cells, cells[cells.index(path.name) :][:12]))
        ((_, best),) = scalars(path)["hparams/best_accuracy"]
        assert row["norm_type"] == norm_type and row["hparams/best_accuracy"] == f"{best:#.5g}"


def test_attention_images(browser, address, runs):
    """Truth: the runs' events; an image at each of the two evaluations, the last one shown."""
    sizes = shown(
        browser,
        f"{address}#images",
        "img",
        "[element.naturalWidth, element.naturalHeight]",
        lambda sizes: len(sizes) == len(runs) and all(width for width, _ in sizes),
    )
    for path, size in zip(runs.values(), sizes):
        images = events(path).Images("attention")
        assert [image.step for image in images] == [6, 12]
        assert size == [images[-1].width, images[-1].height]


def test_text(browser, address, runs):
    texts = shown(
        browser,
        f"{address}#text",
        "tf-markdown-view",
        "element.shadowRoot.textContent",
        lambda texts: sum("Namespace(" in text for text in texts) == len(runs),
    )
    for norm_type in runs:
        assert any(f"norm_type='{norm_type}'" in text for text in texts)


if __name__ == "__main__":
    with chromium() as browser, tensorboard(os.getcwd()) as address:
        runs = [path for path in Path("logs").iterdir() if path.is_dir()]
        charts(browser, address, "train/(?!loss_)", len(runs))
        browser.save_screenshot(sys.argv[1])
