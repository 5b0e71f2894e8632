"""The report in a real Chromium: it renders, fetches nothing, runs nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import BEFORE, CELLS, NUM_ROWS, TASKS, write_run

from accrete.eval.report import write_report

pytestmark = pytest.mark.browser

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = '</script><script>document.title="run"</script><img src=x onerror=alert(1)>&amp;"'


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A report in a page, and everything the page complained of or asked for."""

    def __init__(self, browser: Any, report: Path, width: int, scheme: str) -> None:
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri(), wait_until="load")

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]


def check_quiet(opened: Opened, report: Path) -> None:
    assert opened.trouble == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [report.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_renders_at_any_width_without_a_request(
    chromium: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    report = write_report(write_run(tmp_path / "run"))
    opened = Opened(chromium, report, width, scheme)
    check_quiet(opened, report)
    page_width = opened.page.evaluate("document.documentElement.scrollWidth")
    assert page_width <= width, "only tables may scroll sideways, not the page"
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red < 60) is (scheme == "dark")
    opened.page.close()


def test_the_matrix_is_whole_and_right(chromium: Any, tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run"))
    opened = Opened(chromium, report, 1280, "light")
    scored = opened.texts("#matrix td.scored")
    wanted = [CELLS[t][i] for t in range(4) for i in range(t + 1)]
    assert [float(text.split()[0]) for text in scored] == wanted
    assert len(opened.texts("#matrix td.own")) == 4
    changes = [text.split()[1] for text in scored if "learned" not in text]
    minus = "\N{MINUS SIGN}"
    assert changes == [f"{minus}12.0", f"{minus}23.0", f"{minus}4.0", f"{minus}47.0", "0.0",
                       f"{minus}3.0"]  # fmt: skip
    heads = opened.texts("#matrix thead th[scope=col] bdi")
    assert heads == list(TASKS)
    assert opened.texts("#matrix thead small")[:4] == [f"n = {NUM_ROWS}"] * 4
    zero_shot = opened.texts("#matrix tbody tr:not(:first-child) td.zero_shot")
    assert [float(text) for text in zero_shot] == [float(score) for score in BEFORE[1:]]
    assert opened.page.locator("#matrix tbody tr").count() == 5  # untrained, and four stages
    assert opened.page.locator("#matrix tbody td").count() == 5 * 5
    opened.page.close()


def test_every_part_is_there(chromium: Any, tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run"))
    opened = Opened(chromium, report, 1280, "light")
    values = opened.texts(".card .value")
    minus = "\N{MINUS SIGN}"
    assert values == ["51.0 %", f"{minus}16.7 points", "16.7 points", "9.7 points", "63.5 %",
                      "61.5 %"]  # fmt: skip
    assert opened.page.locator(".curves svg[role=img][aria-label]").count() == 4
    assert opened.page.locator(".loss svg path.curve").count() == 1
    assert opened.page.locator("#ledger tbody tr").count() == 4
    assert opened.page.locator("#retention tbody tr").count() == 3
    assert opened.texts("#command") == [
        "accrete run standard_cl/order1 seed=3 --run-dir 'runs/a b'"
    ]
    assert opened.texts("#warnings li") == [
        "3 of 320 rows of amazon had their input cut to 192 tokens."
    ]
    # Every table says what its columns are, and every section has a heading.
    for table in opened.page.locator("main section > .scroll > table").all():
        assert table.locator("thead th[scope=col]").count() > 1
        assert table.locator("tbody th[scope=row]").count() > 0
    for section in opened.page.locator("main section").all():
        label = section.get_attribute("aria-labelledby")
        assert opened.page.locator(f"#{label}").count() == 1
    data = json.loads(opened.page.locator("#accrete-run").text_content())
    assert data["matrix"]["matrix"][3] == [44.0, 31.0, 49.0, 80.0]
    opened.page.close()


def test_an_unfinished_run_says_so(chromium: Any, tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", finished_stages=2))
    opened = Opened(chromium, report, 390, "dark")
    check_quiet(opened, report)
    assert opened.texts("#status") == ["2 of 4 stages scored"]
    assert opened.texts("#matrix td.pending") == ["not yet"] * 7
    assert len(opened.texts("#matrix td.scored")) == 3
    opened.page.close()


def test_a_run_without_scores_says_so(chromium: Any, tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", finished_stages=0))
    opened = Opened(chromium, report, 1280, "light")
    check_quiet(opened, report)
    assert "stage 1 of 4 is under way" in opened.texts("#verdict")[0]
    assert opened.texts("#matrix td.scored") == []
    opened.page.close()


def test_hostile_names_and_answers_are_shown_as_text(chromium: Any, tmp_path: Path) -> None:
    tasks = (EVIL, "amazon", "yahoo", "agnews")
    run = write_run(tmp_path / "run", tasks=tasks, prediction=EVIL, row_id=EVIL)
    report = write_report(run)
    opened = Opened(chromium, report, 1280, "light")
    check_quiet(opened, report)
    assert opened.page.title() != "run"
    assert opened.texts("#matrix thead th bdi")[0] == EVIL
    assert opened.page.locator("img, iframe, script:not([type='application/json'])").count() == 0
    opened.page.locator("#lost-answers summary").click()
    answers = opened.texts("#lost-answers tbody bdi")
    assert EVIL in answers
    data = json.loads(opened.page.locator("#accrete-run").text_content())
    assert data["matrix"]["tasks"][0] == EVIL
    opened.page.close()


def test_the_page_could_not_run_a_script(chromium: Any, tmp_path: Path) -> None:
    """The second line of defence: even unescaped, a script would be refused."""
    report = write_report(write_run(tmp_path / "run"))
    text = report.read_text()
    assert "<body>" in text
    report.write_text(text.replace("<body>", "<body><script>document.title = 'run'</script>"))
    opened = Opened(chromium, report, 1280, "light")
    assert opened.page.title() != "run"
    assert any("Content Security Policy" in message for message in opened.trouble)
    opened.page.close()
