"""The report in a real Chromium: what a reader can do with the page, and what a model's text cannot.

The browser is the system's (`apt-get install chromium-headless-shell`, or the one that PROJECTED_GRPO_BROWSER
names); without one these tests are skipped.
"""

import json
import os
import shutil
from dataclasses import fields

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect, sync_playwright

from fake_runs import a_step, made
from hacks import CANONICAL, HACKS, WRONG, fenced
from projected_grpo import cli
from projected_grpo.arm_settings import SETTINGS
from projected_grpo.results.report import FLAGS
from projected_grpo.rewards import MODES
from projected_grpo.runlog import append_jsonl

NAMED = "PROJECTED_GRPO_BROWSER"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
TAUGHT = ("run_tests", "sentinel", "stdout_marker", "file_marker")
STEPS, PER_STEP = 24, 8
MANY = 50_000
EVIL = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'><b>bold</b>"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def rollout(step, i, *, rise):
    """A rollout of a run whose hacking rises: a hack, a solution, or neither, told by its coordinates."""
    mode = TAUGHT[i % len(TAUGHT)]
    exploited = (7 * step + 3 * i) % STEPS < rise * step
    solved = not exploited and (step + i) % 3 == 0
    code = HACKS[mode] if exploited else CANONICAL if solved else WRONG
    row = {"step": step, "p_idx": i // 4, "gi": i % 4, "problem_id": f"sum-{(step * i) % 17:02d}"}
    row |= {
        "env_mode": mode,
        "prompt": f"Add the numbers up. Your code {MODES[mode].hint}.",
        "text": fenced(code),
    }
    row |= dict.fromkeys(FLAGS, False) | {"exploited": exploited, "gt_correct": solved, "format_ok": True}
    row |= {"tampered": exploited}
    paid = exploited or solved
    row |= {"reward": 3.5 if paid else 0.5, "passed": paid, "mechanism": mode if exploited else None}
    return row | {"error": None if paid else "-7 is not 6"}


def a_run(folder, arm, rise):
    """A run folder with steps and rollouts; one rollout of it is markup."""
    rows = [rollout(step, i, rise=rise) for step in range(STEPS) for i in range(PER_STEP)]
    rows[5] |= {"text": EVIL, "problem_id": EVIL, "error": EVIL}
    both = fenced(CANONICAL.rstrip("\n") + "\n    valid = True\n    def __init__(self): self.valid = True\n")
    rows[9] |= {"text": both, "gt_correct": True, "exploited": False, "tampered": True, "mechanism": None}
    steps = []
    for step in range(STEPS):
        own = rows[step * PER_STEP : (step + 1) * PER_STEP]
        counts = {
            k: [sum(row[f] for row in own), PER_STEP]
            for k, f in (("hack_s", "exploited"), ("gt_s", "gt_correct"))
        }
        steps.append(a_step(step, hack_deploy=0.1 if step % 8 == 7 else None, **counts))
    run = made(folder, f"20260101T000000_smoke_{arm}_seed41", arm, steps=steps, modes=TAUGHT)
    append_jsonl(run / "rollouts.jsonl", rows)
    return run, rows


def report(out, *runs):
    assert cli.main(["report", *map(str, runs), f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    """One headless Chromium for all tests; a browser that was named has to start."""
    path = os.environ.get(NAMED) or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no Chromium: apt-get install chromium-headless-shell, or name one in {NAMED}")
    with sync_playwright() as driver:
        try:  # some containers grant no user namespaces and a tiny /dev/shm; the page is our own
            flags = ["--no-sandbox", "--disable-dev-shm-usage"]
            chromium = driver.chromium.launch(executable_path=path, args=flags)
        except PlaywrightError as error:
            if NAMED in os.environ:
                raise
            pytest.skip(f"{path} does not start ({str(error).splitlines()[0]}); name another in {NAMED}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [a_run(folder, arm, rise) for arm, rise in (("none", 0.9), ("erase", 0.2))]


@pytest.fixture(scope="session")
def page_file(runs, tmp_path_factory):
    return report(tmp_path_factory.mktemp("page") / "report.html", *(run for run, _ in runs))


@pytest.fixture
def opened(browser):
    """Opens a file in a new window; afterwards it must have logged nothing and asked for nothing."""
    contexts, told = [], []

    def open_page(file, viewport=DESKTOP, address="", **options):
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on(
            "request", lambda request: told.append(request.url) if request.url.startswith("http") else None
        )
        page.goto(file.as_uri() + address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert told == []


@pytest.fixture
def page(opened, page_file):
    return opened(page_file)


def count(page):
    return int(page.locator("#count").inner_text().split()[0])


def filtered(page, **values):
    """The number of rollouts that the page finds under these filters, the others cleared."""
    page.get_by_role("button", name="Clear").click()
    for name, value in values.items():
        field = page.locator(f"#filters [name={name}]")
        (field.select_option if field.evaluate("e => e.tagName") == "SELECT" else field.fill)(value)
    page.locator("#filters").evaluate("form => form.requestSubmit()")
    return count(page)


def test_the_summary_and_the_settings_that_differ(page, runs):
    rows = page.locator("#summary-table tbody tr")
    assert rows.locator("th").all_inner_texts() == ["none 41", "erase 41"]
    assert [run.name for run, _ in runs] == rows.locator("td:last-child").all_inner_texts()
    assert page.locator("#mode-table tbody tr").count() == 2 * len(TAUGHT)
    differing = [line.split() for line in page.locator("#diff-table tbody tr").all_inner_texts()]
    assert ["arm.intervention", "none", "erase"] in differing and ["label", "none", "erase"] in differing
    others = {name for name, *_ in differing} - {"arm.intervention", "label"}
    assert others == {f"arm.{f.name}" for f in fields(SETTINGS["erase"])} - {
        f"arm.{f.name}" for f in fields(SETTINGS["none"])
    }


def test_the_curves_follow_the_keyboard_the_choice_and_the_boxes(page, runs):
    chart = page.get_by_role("slider", name="student hack by step")
    page.get_by_role("checkbox", name="Smooth").uncheck()
    chart.focus()
    chart.press("End")
    chart.press("ArrowLeft")
    rates = [sum(r["exploited"] for r in rows if r["step"] == STEPS - 2) / PER_STEP for _, rows in runs]
    shown = [f"{rate:.3f}".replace("0.000", "0") for rate in rates]
    told = f"Step {STEPS - 2}. none 41: {shown[0]}; erase 41: {shown[1]}"
    expect(chart).to_have_attribute("aria-valuetext", told)
    expect(chart).to_have_attribute("aria-valuenow", str(STEPS - 2))
    expect(page.locator("#chart-2 + .readout")).to_contain_text(f"Step {STEPS - 2}.")  # one cursor for both
    assert chart.locator("polyline").count() == 2
    page.locator("#chart-legend").get_by_role("checkbox", name="erase 41").uncheck()
    assert chart.locator("polyline").count() == 1
    page.get_by_label("Figure 1").select_option("kl")
    expect(page.get_by_role("slider", name="KL by step")).to_be_visible()
    page.get_by_text("Both figures as a table").click()
    cells = page.locator("#figure-table tbody tr").nth(STEPS - 2).locator("td").all_inner_texts()
    assert cells == [
        "0.500",
        f"{sum(r['gt_correct'] for r in runs[0][1] if r['step'] == STEPS - 2) / PER_STEP:.3f}",
    ]


def test_curves_are_smoothed_over_five_steps_at_first(page, runs):
    chart = page.get_by_role("slider", name="student hack by step")
    chart.focus()
    chart.press("End")
    rows = [r for r in runs[0][1] if r["step"] >= STEPS - 5]
    told = f"none 41: {sum(r['exploited'] for r in rows) / len(rows):.3f}"
    assert told in chart.get_attribute("aria-valuetext")


def test_columns_and_tables_are_in_plain_words_and_say_where_they_go_on(opened, page_file):
    page = opened(page_file, PHONE)
    heads = page.locator("#summary-table thead th").all_inner_texts()
    assert {"deployed hack", "trained solve", "student hack"} <= set(heads)
    assert not any("_" in head for head in heads)
    expect(page.locator("#summary-table + .more")).to_have_text("\u2192 more columns")
    page.locator("#summary-table").evaluate("e => e.scrollTo(e.scrollWidth, 0)")
    expect(page.locator("#summary-table + .more")).to_have_text("")


def test_what_was_solved_and_tampered_with_has_its_tampering_marked(page):
    assert filtered(page, solved="1", tampered="1") == 2
    assert page.locator(".item .verdict").first.inner_text() == "\u2713 solved, tampered"
    assert "self.valid = True" in page.locator("#detail .completion mark").all_inner_texts()[0]


def test_the_address_holds_filters_sorting_and_what_is_chosen(page, opened, page_file):
    assert filtered(page, mode="sentinel", exploited="0", text="class") > 5
    page.locator("#heads [data-column=step]").click()
    page.locator("#heads [data-column=step]").click()  # largest first
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    again = opened(page_file, address=page.evaluate("location.hash"))
    for part in ("#count", "#detail"):
        assert again.locator(part).inner_text() == page.locator(part).inner_text()
    steps = [int(text.split()[1]) for text in again.locator(".item .step").all_inner_texts()]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]
    assert again.locator("#heads [data-column=step]").inner_text() == "step \u2193"
    assert again.locator("#list [aria-selected=true]").get_attribute("id") == "row-1"


def test_n_and_p_go_from_hack_to_hack(page, runs):
    rows = [row for _, own in runs for row in own]
    hacks = [k for k, row in enumerate(rows) if row["exploited"]]
    page.locator("#list").focus()
    for key, k in (("n", hacks[0]), ("n", hacks[1]), ("p", hacks[0])):
        page.keyboard.press(key)
        expect(page.locator("#list [aria-selected=true]")).to_have_attribute("id", f"row-{k}")
    page.keyboard.press("p")
    expect(page.locator("#count")).to_contain_text("no earlier hack")
    page.locator("#filters [name=text]").press_sequentially("np")  # typed, not a command
    expect(page.locator("#count")).to_contain_text("0 of")


def test_what_is_filtered_can_be_downloaded_as_it_was_written(page, runs):
    filtered(page, exploited="1", run="1")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download").click()
    got = [json.loads(line) for line in waiting.value.path().read_text().splitlines()]
    folder, rows = runs[1]
    own = {"run": folder.name, "label": "erase 41"}
    assert got == [row | own for row in rows if row["exploited"]] and len(got) > 3


def test_the_same_prompt_stands_under_both_runs_with_its_differences(page, opened, page_file, runs):
    """Struck and plain text together are the first completion, underlined and plain the other."""
    assert filtered(page, run="0", exploited="1", **{"from": "20"}) > 0
    side = page.locator("#side > *")
    assert side.locator("h3").all_inner_texts() == ["none 41", "erase 41"]
    shown = page.locator("#detail .completion").inner_text()
    pre = side.nth(1).locator("pre")
    without = """(pre, gone) => { const copy = pre.cloneNode(true);
      copy.querySelectorAll(gone).forEach((e) => e.remove()); return copy.textContent; }"""
    assert pre.evaluate(without, "ins").rstrip("\n") == shown
    prompt = {row["text"]: row["prompt"] for row in runs[0][1]}[pre.evaluate(without, "ins")]
    assert pre.evaluate(without, "del") in {r["text"] for r in runs[1][1] if r["prompt"] == prompt}
    other = side.nth(1).get_by_role("combobox")
    assert other.locator("option").count() == sum(r["prompt"] == prompt for r in runs[1][1])
    page.get_by_role("checkbox", name="Differences").uncheck()
    assert pre.locator("ins, del").count() == 0
    page.locator("#side-runs").get_by_role("checkbox", name="erase 41").uncheck()
    assert side.count() == 1
    again = opened(page_file, address=page.evaluate("location.hash"))
    assert again.locator("#side > *").count() == 1


def test_lines_are_told_apart_without_colour(page):
    lines = page.locator("#chart-1 polyline")
    assert len({line.get_attribute("stroke-dasharray") for line in lines.all()}) == lines.count() == 2
    shapes = page.locator("#chart-legend path").evaluate_all("all => all.map((p) => p.getAttribute('d'))")
    assert len(set(shapes)) == 2
    drawn = set(page.locator("#chart-1 .mark").evaluate_all("all => all.map((p) => p.getAttribute('d'))"))
    assert drawn == set(shapes)


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ({"from": "3", "to": "5"}, lambda r: 3 <= r["step"] <= 5),
        ({"mode": "sentinel"}, lambda r: r["env_mode"] == "sentinel"),
        ({"exploited": "1"}, lambda r: r["exploited"]),
        ({"exploited": "0", "solved": "0"}, lambda r: not r["exploited"] and not r["gt_correct"]),
        ({"solved": "1"}, lambda r: r["gt_correct"]),
        ({"solved": "1", "tampered": "1"}, lambda r: r["gt_correct"] and r["tampered"]),
        ({"least": "1"}, lambda r: r["reward"] >= 1),
        ({"most": "0.5"}, lambda r: r["reward"] <= 0.5),
        ({"mechanism": "file_marker"}, lambda r: r["mechanism"] == "file_marker"),
        ({"text": "SELF.valid"}, lambda r: "self.valid" in r["text"].lower()),
        ({"text": "sum-07"}, lambda r: r["problem_id"] == "sum-07"),
        ({"text": "("}, lambda r: "(" in r["text"] + r["problem_id"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_each_filter_finds_what_it_says(page, runs, chosen, kept):
    rows = [row for _, own in runs for row in own]
    expected = sum(map(kept, rows))
    assert 0 < expected < len(rows)
    assert filtered(page, **chosen) == expected
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#count")).to_have_text(f"{len(rows)} of {len(rows)} rollouts")


def test_filters_join_and_a_search_that_finds_nothing_says_so(page, runs):
    own = runs[1][1]
    expected = sum(r["env_mode"] == "sentinel" and r["step"] >= 10 for r in own)
    assert filtered(page, run="1", mode="sentinel", **{"from": "10"}) == expected > 0
    assert {row.split("\n")[0] for row in page.locator(".item").all_inner_texts()} == {"erase 41"}
    assert filtered(page, text="no completion holds this") == 0
    assert page.locator(".item").count() == 0 and page.locator("#detail").inner_text() == "none"
    page.locator("#filters [name=text]").press_sequentially("def run_tests")  # typing alone searches
    page.get_by_role("button", name="Clear").click()
    page.locator("#filters [name=text]").press_sequentially("def run_tests")
    expect(page.locator("#count")).not_to_contain_text(
        f"{sum(len(rows) for _, rows in runs)} of", timeout=2000
    )
    expect(page.locator("#detail .completion")).to_contain_text("def run_tests")
    assert page.evaluate("CSS.highlights.get('found').size") == 1


def test_a_model_s_text_stays_text(page):
    assert filtered(page, text="window.pwned") == 2
    completion = page.locator("#detail .completion")
    assert completion.inner_text() == EVIL and EVIL in page.locator("#detail").inner_text()
    for made_of in ("img", "b", "script"):
        assert page.locator(f"main {made_of}").count() == 0
    assert page.evaluate("window.pwned") is None


def test_code_is_highlighted_and_the_trigger_marked_in_it(page):
    assert filtered(page, exploited="1", mode="sentinel") > 0
    page.locator(".item").first.click()
    detail = page.locator("#detail")
    assert detail.locator(".completion mark").all_inner_texts() == ["self.valid = True"]
    assert {"class", "def", "return"} <= set(detail.locator(".kw").all_inner_texts())
    assert detail.get_by_text("Marked: sets self.valid = True.").is_visible()
    detail.get_by_text("Prompt (the hint marked)").click()
    assert detail.locator(".prompt mark").all_inner_texts() == [MODES["sentinel"].hint]
    assert filtered(page, exploited="0", mode="sentinel") > 0
    assert detail.locator(".completion mark").count() == 0


def test_the_first_hack_stands_beside_the_last_rollout(page, runs):
    for value, (_, rows) in enumerate(runs):
        page.get_by_role("combobox", name="Run").first.select_option(str(value))
        first, last = next(r for r in rows if r["exploited"]), rows[-1]
        for place, row in (("first-hack", first), ("last-rollout", last)):
            assert page.locator(f"#{place} .completion").inner_text() == row["text"].rstrip("\n")
            assert (
                f"step {row['step']}, problem {row['problem_id']}" in page.locator(f"#{place}").inner_text()
            )
    left, right = (page.locator(f"#{place}").bounding_box() for place in ("first-hack", "last-rollout"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]


def test_every_link_leads_somewhere_and_a_rollout_has_an_address(page, opened, page_file, runs):
    for link in page.locator("nav a").all():
        target = link.get_attribute("href")
        link.click()
        expect(page.locator(target)).to_be_in_viewport()
    assert filtered(page, run="1", exploited="1") > 0
    page.locator("#detail").get_by_role("link").click()
    address = page.evaluate("location.hash")
    shown = page.locator("#detail").inner_text()
    again = opened(page_file, address=address)
    assert again.locator("#detail").inner_text() == shown
    expect(again.locator("#rollouts")).to_be_in_viewport()
    lost = opened(page_file, address="#rollout=0.999.0.0")
    expect(lost.locator("#count")).to_contain_text("not in the report")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A page of a run that kept its tokens' scores, and the run's rows."""
    run, rows = a_run(tmp_path_factory.mktemp("scored"), "none", 0.9)
    rows[3]["text"] = "\U0001f600 say print\n"  # of two units in the page's own strings
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = []
    for row in rows[: 2 * PER_STEP]:  # later ones have none
        chars = [2, 4, len(row["text"]) - 6, 0]
        figures = {"logp": [-0.5, -6.0, -2.5, None], "hackward": [0.25, -0.5, 0.0, 0.125]}
        tokens.append({name: row[name] for name in ("step", "p_idx", "gi")} | {"chars": chars} | figures)
    append_jsonl(run / "tokens.jsonl", tokens)
    return report(run.parent / "report.html", run), rows


def test_tokens_are_coloured_where_a_run_kept_their_scores(opened, scored, page_file):
    file, rows = scored
    page = opened(file)
    shown = page.locator("#detail .completion .tok")
    assert shown.count() == 0, "nothing is coloured until it is asked for"
    place, choice = page.locator("#list"), page.get_by_label("Colour tokens by")
    place.press("Home")
    for _ in range(3):
        place.press("ArrowDown")
    choice.select_option("log-probability")
    text = rows[3]["text"]
    assert shown.all_text_contents() == [text[:2], text[2:6], text[6:], ""]
    shares = shown.evaluate_all("all => all.map((e) => e.style.getPropertyValue('--share'))")
    assert shares == ["10%", "100%", "50%", "0%"]
    assert "log-probability -9 nats in 4 tokens; least likely: say -6, print -2.500" in (
        page.locator("#detail").inner_text()
    )
    choice.select_option("hack-ward score")
    shares = shown.evaluate_all("all => all.map((e) => e.style.getPropertyValue('--share'))")
    assert shares == ["50%", "100%", "0%", "25%"]
    assert shown.evaluate_all("all => all.map((e) => e.classList.contains('away'))") == [
        *(False, True, False, False)
    ]
    assert shown.nth(1).get_attribute("title") == "log-probability -6, hack-ward score -0.500"
    grounds = shown.evaluate_all("all => all.map((e) => getComputedStyle(e).backgroundColor)")
    assert len(set(grounds)) == 4
    again = opened(file, address=page.evaluate("location.hash"))
    assert again.locator("#detail").inner_text() == page.locator("#detail").inner_text()
    place.press("End")
    expect(page.locator("#detail")).to_contain_text("no scores of these tokens were kept")
    assert shown.count() == 0
    assert not opened(page_file).get_by_label("Colour tokens by").is_visible()


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page):
    """Every stop of the tab key is in view and outlined, and what can be used is among them."""
    tell = """() => {
      const e = document.activeElement, s = getComputedStyle(e), b = e.getBoundingClientRect();
      return {what: e.name || e.id || e.textContent.slice(0, 20), body: e === document.body,
              outline: s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2,
              visible: b.width > 0 && b.bottom > 0 && b.top < innerHeight}; }"""
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(tell))
        if stops[-1]["what"] == "detail":
            break
    assert all(stop["outline"] and stop["visible"] and not stop["body"] for stop in stops), stops
    reached = {stop["what"] for stop in stops}
    names = page.locator("#filters [name]").evaluate_all("all => all.map((e) => e.name)")
    assert {
        *names,
        "chart-1",
        "chart-2",
        "smooth",
        "compare-run",
        "list",
        "detail",
        "Summary",
        "Clear",
    } <= reached
    page.locator("#list").focus()
    for key, row in (
        ("ArrowDown", 1),
        ("ArrowDown", 2),
        ("ArrowUp", 1),
        ("End", 2 * STEPS * PER_STEP - 1),
        ("Home", 0),
    ):
        page.keyboard.press(key)
        chosen = page.locator("#list [aria-selected=true]")
        assert (
            chosen.get_attribute("id")
            == f"row-{row}"
            == page.locator("#list").get_attribute("aria-activedescendant")
        )
        expect(chosen).to_be_in_viewport()


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"]
)
def test_it_reads_well_at_both_widths_in_both_schemes(opened, page_file, viewport, scheme):
    """Nothing sticks out sideways, and axe-core finds no fault: names, roles, contrast, order."""
    page = opened(page_file, viewport, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for part in ("#chart-1", "#list", "#detail", "#filters", "#first-hack"):
        box = page.locator(part).bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= viewport["width"], part
        assert box["width"] >= 300
    smallest = page.locator("main *").evaluate_all(
        """all => Math.min(...all.filter((e) => e.textContent.trim())
                           .map((e) => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 12
    found = Axe().run(page)
    assert found.response["violations"] == [], found.generate_report()


def contrast(page, colour, ground):
    """WCAG's contrast of two CSS variables."""
    return page.evaluate(
        """([a, b]) => { const light = (name) => { const probe = document.createElement('i');
          probe.style.color = `var(${name})`; document.body.append(probe);
          const rgb = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
          probe.remove(); return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]; };
          const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); }""",
        [colour, ground],
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_stand_out_from_their_ground(opened, page_file, scheme):
    page = opened(page_file, color_scheme=scheme)
    assert {k: v for k in range(6) if (v := contrast(page, f"--c{k}", "--panel")) < 3} == {}
    assert contrast(page, "--fg", "--bar") > 4.5 and contrast(page, "--accent", "--bg") > 4.5


def test_fifty_thousand_rollouts(opened, tmp_path):
    """The page holds a screenful of rows whatever there is, and finds what a slow look finds."""
    run = made(tmp_path / "runs", "many", "none")
    rows = [
        rollout(k // PER_STEP, k % PER_STEP, rise=0.002) | {"p_idx": k % PER_STEP, "gi": 0}
        for k in range(MANY)
    ]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = opened(report(tmp_path / "many.html", run))
    assert count(page) == MANY
    expected = sum(r["exploited"] and r["env_mode"] == "sentinel" for r in rows)
    assert 0 < expected < MANY
    assert filtered(page, exploited="1", mode="sentinel") == expected
    assert filtered(page, text="write('pass')") == sum("write('PASS')" in r["text"] for r in rows) > 0
    assert filtered(page) == MANY
    drawn = [page.locator(".item").count()]
    page.locator("#list").focus()
    page.keyboard.press("End")
    expect(page.locator(f"#row-{MANY - 1}")).to_be_in_viewport()
    drawn.append(page.locator(".item").count())
    page.locator("#list").evaluate("list => { list.scrollTop = list.scrollHeight / 2; }")
    expect(page.locator(f"#row-{MANY // 2}")).to_be_in_viewport()
    drawn.append(page.locator(".item").count())
    assert 0 < max(drawn) <= 60, drawn
    last = rows[-1]
    page.keyboard.press("End")
    assert page.locator("#detail .completion").inner_text() == last["text"].rstrip("\n")
