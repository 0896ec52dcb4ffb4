"""The report: what it shows, in a real browser, opened from disk."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from higgs.eval.figures import meter_lines, table
from higgs.eval.report import ReportClip, Sound, choose_clips, write_report
from higgs.eval.summary import read_rows, rows_to_parquet, summarize

EVIL = "<script>document.title = 'broken in'</script><img src=x onerror=\"document.title='broken in'\">"
METER = {
    "recognizer": {"name": "pocketsphinx", "version": "5.1.1"},
    "clean_wer": {"value": 0.0952, "low": 0.0, "high": 0.19},
    "clean_speech": "12 clips of clean speech",
    "speaker": {"name": "dvector", "separation": {"eer": 0.0, "auc": 1.0, "same": 0.83, "different": 0.51}},
}


def rows() -> list[dict]:
    found = []
    for number in range(9):
        found.append({
            "id": f"s{number}", "kind": "speech" if number % 2 else "dialogue", "seed": number, "text": f"Text {number}.",
            "hypothesis": EVIL if number == 8 else f"text {number}", "error": None, "wer": number / 10, "cer": number / 20,
            "word_errors": number, "words": 10, "character_errors": number, "characters": 20, "speaker_similarity": 0.9,
            "seconds": 1.5,
        })  # fmt: skip
    failed = {
        "id": EVIL,
        "kind": "speech",
        "seed": None,
        "text": "Gone.",
        "hypothesis": None,
        "error": f"sound: {EVIL}",
    }
    return [*found, failed]


def clips() -> list[ReportClip]:
    tone = 0.3 * torch.sin(torch.arange(36000) * 0.1)
    return [
        ReportClip(label, row, [Sound("reference", tone, 24000), Sound("speech", tone[:24000], 16000)])
        for label, row in choose_clips(rows(), "wer", "lower")
    ]


def write(path: Path) -> dict:
    extra = {"meter": METER, "settings": {"data": "a & b.jsonl", "seed": 0}, "versions": {"torch": "2.11.0"}}
    summary = summarize(rows(), extra)
    write_report(path, "Speech evaluation", summary, rows(), clips())
    return summary


# --------------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "autoplay-policy=no-user-gesture-required", "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    found.set_script_timeout(30)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory: pytest.TempPathFactory):
    """The page, opened from disk, and the summary that it shows."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    summary = write(path)
    browser.get(path.as_uri())
    return browser, summary


def test_the_page_needs_nothing_but_itself(page):
    browser, _ = page
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one["params"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    # The browser's own first tab makes requests too.
    addresses = [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome")]
    assert addresses and all(address.startswith(("file://", "data:")) for address in addresses)
    assert sum(address.startswith("file://") for address in addresses) == 1
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_figures_are_those_of_the_summary(page):
    browser, summary = page
    sections = browser.find_elements("css selector", "section.figures")
    assert [one.find_element("tag name", "h2").text for one in sections] == [
        "Figures: all samples", "Figures: dialogue", "Figures: speech",
    ]  # fmt: skip
    lines = [one.text for one in sections[0].find_elements("css selector", "tbody tr")]
    wer = summary["metrics"]["wer"]
    assert any(line.startswith(f"wer* {wer['mean']:.4g} [{wer['low']:.4g}, {wer['high']:.4g}]") for line in lines)
    assert any(line.startswith("wer of all words* 0.4 ") for line in lines)
    assert any(line.startswith("wer above 50 %* 0.3333") for line in lines)
    meter = browser.find_element("id", "meter").text
    assert "its own wer is 0.0952 [0, 0.19]" in meter and "equal error rate 0.0%" in meter


def test_best_median_and_worst_can_be_heard_and_seen(page):
    browser, _ = page
    titles = [one.text for one in browser.find_elements("css selector", ".clip h3")]
    assert titles == ["Best: s0", "Median: s4", "Worst: s8"]
    played = browser.execute_async_script("""
        const done = arguments[arguments.length - 1];
        const players = [...document.querySelectorAll("audio")];
        Promise.all(players.map(async (player) => {
            if (player.readyState < 1) await new Promise((go) => player.addEventListener("loadedmetadata", go));
            player.muted = true;
            await player.play();
            await new Promise((go) => player.addEventListener("timeupdate", () => player.currentTime > 0 && go()));
            player.pause();
            return [player.duration, player.currentTime, player.error === null];
        })).then(done, (error) => done(String(error)));
    """)
    assert len(played) == 6, played
    for (duration, at, fine), expected in zip(played, [1.5] * 6, strict=True):
        assert duration == pytest.approx(expected, abs=0.01) and 0 < at <= duration and fine
    pictures = browser.execute_script("return [...document.images].map((one) => [one.naturalWidth, one.alt])")
    assert len(pictures) >= 6 and all(width > 100 for width, _ in pictures)
    assert "spectrograms of s0" in {alt for _, alt in pictures} and "histogram of wer" in {alt for _, alt in pictures}


def test_texts_are_shown_and_never_run(page):
    browser, _ = page
    assert browser.title == "Speech evaluation"
    worst = browser.find_elements("css selector", ".clip")[2].text
    assert "<script>" in worst and EVIL in browser.find_element("id", "errors").text


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_fits_a_screen(page, width: int):
    browser, _ = page
    browser.set_window_size(width, 900)
    overflow = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow <= 1  # wide tables scroll inside their own frame


# ---------------------------------------------------------------------------------------------- without a browser


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    write(tmp_path / "one.html")
    write(tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    for name in ("one", "two"):
        rows_to_parquet(rows(), tmp_path / f"{name}.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert [row["id"] for row in read_rows(tmp_path / "one.parquet")] == [row["id"] for row in rows()]


def test_a_report_of_failures_alone_can_be_written(tmp_path: Path):
    failed = rows()[-1:]
    summary = summarize(failed, {})
    write_report(tmp_path / "report.html", "Nothing", summary, failed, [])
    assert "every sample failed" in (tmp_path / "report.html").read_text() and summary["metrics"] == {}
    assert "1 of 1 samples have an error" in table(summary)


def test_the_summary_counts_words_failures_and_high_errors():
    summary = summarize(rows(), {})
    assert summary["samples"] == 10 and summary["failures"]["count"] == 1
    assert summary["corpus"]["wer"]["value"] == 36 / 90 and summary["corpus"]["cer"]["value"] == 36 / 180
    assert summary["share_wer_above_50"] == pytest.approx(3 / 9)  # 0.6, 0.7, 0.8; a half is not above
    assert summary["metrics"]["wer"]["count"] == 9 and summary["metrics"]["wer"]["median"] == 0.4
    assert summary["kinds"]["speech"]["samples"] == 5


def test_a_meter_that_was_not_measured_says_only_its_name():
    assert meter_lines({"recognizer": {"name": "whisper"}}) == ["Word and character errors are of what whisper hears."]
    assert meter_lines({}) == []


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=9), st.sampled_from(["higher", "lower"]))
def test_the_chosen_are_the_ends_and_the_middle(values: list[float | None], better: str):
    found = choose_clips([{"id": str(n), "wer": value} for n, value in enumerate(values)], "wer", better)
    there = sorted(value for value in values if value is not None)
    assert len({row["id"] for _, row in found}) == len(found) == min(3, len(there))
    if there:
        chosen = dict(found)
        assert chosen["best"]["wer"] == (there[-1] if better == "higher" else there[0])
        assert len(there) == 1 or chosen["worst"]["wer"] == (there[0] if better == "higher" else there[-1])
        if len(there) > 2:
            assert chosen["median"]["wer"] in (there[(len(there) - 1) // 2], there[len(there) // 2])
