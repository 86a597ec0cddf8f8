"""The page of `trl-rlad view` in a real Chromium: pointer, keys, touch, filters, search, and that text stays text."""

import shutil
from itertools import count

import pytest

from trl_rlad.reports.view import render


webdriver = pytest.importorskip("selenium.webdriver", reason="selenium isn't installed")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,  # and one process, with one browser
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its chromedriver on this machine"),
]

FIRST, SECOND = "[data-first='1']", "[data-first='2']"


def record(tokens, gaps, **facts):
    """A completion, by the gap at each token, `None` where the teacher hasn't read it."""
    logps = [-0.5] * len(tokens)
    teacher_logps = [None if gap is None else -0.5 - gap for gap in gaps]
    record = {
        "step": 1,
        "group": 0,
        "prompt": "a prompt",
        "reward": 1.0,
        "advantage": 0.5,
        "part": [1.0] * len(tokens),
    }
    return record | {"tokens": tokens, "logps": logps, "teacher_logps": teacher_logps} | facts


NAMED = {"named": [["A"], ["C", "D"], [" ok"]], "named_logps": [[-0.1], [-0.03, -3.9], [-0.01]]}
FAILED = record(["A", " B", " ok"], [0.0, 4.5, 0.0], reward=0.0, advantage=-0.5, clipped=[0, 1, 0], **NAMED)
SOLVED = record(["A", " C", " never read"], [0.05, -1.5, None], step=2, solved=True, kind="solved", split="eval")
LONG = record([f" t{i}" for i in range(5000)], [2.5 if i in (3000, 4000) else 0.0 for i in range(5000)], step=3)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def see(browser, tmp_path):
    """Opens a page of records of a run. Afterwards nothing may have gone wrong, nor been asked of a network."""
    numbers = count()

    def see(*records, name="run", log=()):
        path = tmp_path / f"{next(numbers)}.html"
        path.write_text(render([(name, list(records), list(log))]), encoding="utf-8")
        browser.get(path.as_uri())
        browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")  # it is drawn
        return browser

    yield see
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def find(browser, selector):
    """The element, as soon as the script has drawn it."""
    wait = WebDriverWait(browser, 10, poll_frequency=0.05)
    return wait.until(lambda browser: browser.find_element("css selector", selector))


def shown(browser, selector):
    return [each.text for each in browser.find_elements("css selector", selector) if each.is_displayed()]


def facts(browser):
    return find(browser, "#facts").text.splitlines()


def point_at(browser, element):
    webdriver.ActionChains(browser).move_to_element(element).perform()


def press(browser, keys):
    webdriver.ActionChains(browser).send_keys(keys).perform()


SAID = [
    "B   student 60.7%, teacher 0.7% (log ratio +4.50)",
    "teacher would say: C 97%, D 2%",
    "clipped by the teacher",
]


def test_what_the_teacher_would_say_stands_beside_the_token_and_is_told_to_pointer_keys_and_touch(see):
    browser = see(FAILED)
    assert find(browser, ".tokens").text == "A BC 97% ok"
    assert find(browser, f"{FIRST}.s4.teacher").text.strip() == "B" and shown(browser, ".tokens .say") == ["C 97%"]
    assert not find(browser, "#facts").is_displayed()
    point_at(browser, find(browser, FIRST))
    assert facts(browser) == SAID
    # Of a run of several tokens it is the one under the pointer, and away from all there is nothing to say
    point_at(browser, find(browser, "h1"))
    WebDriverWait(browser, 10).until(lambda browser: not find(browser, "#facts").is_displayed())
    press(browser, "n")
    assert browser.switch_to.active_element == find(browser, FIRST) and facts(browser) == SAID
    press(browser, webdriver.Keys.ARROW_RIGHT)
    assert facts(browser) == ["ok   student 60.7%, teacher 60.7% (log ratio +0.00)"]
    press(browser, webdriver.Keys.ARROW_LEFT)
    assert facts(browser) == SAID
    # A page that has just scrolled may tell of the pointer once more
    hide = lambda browser: press(browser, webdriver.Keys.ESCAPE) or not find(browser, "#facts").is_displayed()  # noqa: E731
    WebDriverWait(browser, 10).until(hide)
    assert find(browser, "#facts").get_attribute("role") == "status"
    box = browser.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.x + 5, b.y + 5]", find(browser, FIRST)
    )
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    touch = {"type": "touchStart", "touchPoints": [{"x": box[0], "y": box[1]}]}
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    WebDriverWait(browser, 10).until(lambda browser: facts(browser))
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert facts(browser) == SAID


def test_a_token_without_colour_has_its_figures_too(see):
    browser = see(record(["one", " two", " three"], [0.0, 0.0, 0.0]))
    run = find(browser, "[data-first='0']")
    assert run.text == "one two three"
    left, places = -run.size["width"] / 2, []
    for share, word in ((0.1, "one"), (0.4, "two"), (0.9, "three")):
        x = left + share * run.size["width"]
        webdriver.ActionChains(browser).move_to_element_with_offset(run, int(x), 0).perform()
        assert facts(browser)[0].startswith(f"{word}   student 60.7%")
        places.append(find(browser, "#facts").location["x"])
    assert places[0] < places[1] < places[2]  # below its own word


def test_what_is_said_of_a_word_on_the_next_line_does_not_cover_it(see):
    browser = see(record(["xy " * 36, " " + "B" * 40], [0.0, 4.5]))  # the blank before it ends the line
    press(browser, "n")
    rects = "return [...arguments[0].getClientRects()].map((x) => [x.top, x.bottom])"
    _, (top, bottom) = browser.execute_script(rects, find(browser, ".here"))
    ((above, below),) = browser.execute_script(rects, find(browser, "#facts"))
    assert above >= bottom or below <= top


def test_keys_lead_from_one_large_disagreement_to_the_next_and_back(see):
    browser = see(LONG, FAILED)
    for key, word in (("n", "t3000"), ("n", "t4000"), ("n", "B"), ("p", "t4000"), ("p", "t3000"), ("p", "t3000")):
        press(browser, key)
        assert browser.switch_to.active_element.text.strip() == word
        top = browser.execute_script(
            "return arguments[0].getBoundingClientRect().top", browser.switch_to.active_element
        )
        assert 0 < top < 1000  # in sight
    # Not while somebody writes
    search = find(browser, "[name=search]")
    search.send_keys("n")
    assert browser.switch_to.active_element == search


def test_a_strip_shows_where_they_disagree_and_leads_there(see):
    browser = see(LONG)
    canvas = find(browser, "canvas")
    x = int(canvas.size["width"] * (4000 / 5000 - 0.5)) + 1
    webdriver.ActionChains(browser).move_to_element_with_offset(canvas, x, 0).click().perform()
    assert find(browser, ".here").text.strip() == "t4000"


def test_the_label_of_a_long_completion_stays_in_sight(see):
    browser = see(record([f" t{i}" for i in range(3000)], [2.5 if i == 2900 else 0.5 for i in range(3000)]))
    press(browser, "n")
    tops = "return ['.label', '.here'].map((x) => document.querySelector(x).getBoundingClientRect().top)"
    label, here = browser.execute_script(tops)
    assert 0 <= label < 20 and 200 < here < 800


def test_long_runs_without_colour_are_folded(see):
    browser = see(LONG)
    find(browser, ".fold")
    folds = browser.find_elements("css selector", ".fold")
    assert [fold.text for fold in folds] == [
        f"… {number} tokens without colour …" for number in ("2,940", "939", "939")
    ]
    assert "t39" in find(browser, ".tokens").text and "t41 " not in find(browser, ".tokens").text
    folds[0].click()
    assert "t41 " in find(browser, ".tokens").text and len(browser.find_elements("css selector", ".fold")) == 2


def test_filters_leave_what_was_asked_for(see):
    browser = see(FAILED, LONG | {"group": 5, "teacher": "m"}, SOLVED)
    choose = lambda name, text: find(browser, f"[name={name}]").send_keys(text)  # noqa: E731
    assert len(shown(browser, "summary")) == 3
    for name, text, expected in (
        ("step", "3", ["step 3 · group 5"]),
        ("outcome", "failed", ["step 1 · group 0"]),
        ("split", "evaluation", ["evaluation at step 2 · group 0 · solved"]),
        ("kind", "solved", ["evaluation at step 2 · group 0 · solved"]),
        ("teacher", "m", ["step 3 · group 5"]),
        ("search", "t4999", ["step 3 · group 5"]),
        ("search", "NEVER", ["evaluation at step 2 · group 0 · solved"]),
        ("search", "a c", ["evaluation at step 2 · group 0 · solved"]),
    ):
        choose(name, text)
        assert [" · ".join(title.split(" · ")[1:-1]) for title in shown(browser, "summary")] == expected, name
        assert find(browser, "output").text == "1 of 3 groups"
        browser.execute_script("document.querySelector('form').reset()")
        browser.execute_script("document.querySelector('form').dispatchEvent(new Event('input'))")
    assert len(shown(browser, "summary")) == 3


def test_a_search_leads_from_hit_to_hit_through_what_is_folded(see):
    browser = see(LONG)
    search = find(browser, "[name=search]")
    for number in ("1234", "1235"):
        search.clear()
        search.send_keys(f"t{number} t", webdriver.Keys.ENTER, webdriver.Keys.ENTER)  # the only one, again
        assert find(browser, "output").text == "1 of 1 groups"
        assert facts(browser)[0].startswith(f"t{number} ")
        found = browser.execute_script("return [...CSS.highlights.get('found')][0].toString()")
        assert found == f"t{number} t"
    search.clear()
    search.send_keys("t77", webdriver.Keys.ENTER)
    for number in ("770", "771", "772"):
        search.send_keys(webdriver.Keys.ENTER)
        assert facts(browser)[0].startswith(f"t{number} ")
    search.send_keys("nowhere", webdriver.Keys.ENTER)
    assert find(browser, "output").text == "found in no completion"


def test_the_title_is_folded_with_prompt_and_rewards(see):
    groups = [
        FAILED | {"group": i, "prompt": f"long\nprompt {i}", "rewards": [0.0, 1.0], "kind": "failed"} for i in range(5)
    ]
    browser = see(*groups)
    details = browser.find_elements("css selector", "details")
    assert [each.get_attribute("open") is not None for each in details] == [True] * 3 + [False] * 2
    assert details[4].text.splitlines() == [
        "run · step 1 · group 4 · failed · teacher's part 1.00",
        "rewards 0, 1",
        "long prompt 4",
    ]
    # What a filter leaves is unfolded
    search = find(browser, "[name=search]")
    search.send_keys("prompt 3")
    assert [each.get_attribute("open") is not None for each in details] == [True] * 4 + [False]
    search.send_keys(webdriver.Keys.BACKSPACE * 8)
    # Not by the pointer, under which the groups above may grow while they are drawn
    browser.execute_script("arguments[0].click()", details[4].find_element("css selector", "summary"))
    assert details[4].find_element("css selector", ".prompt").text == "long\nprompt 4"
    assert details[4].find_element("css selector", ".label").text.splitlines() == [
        "reward 0", "advantage −0.50", "student − teacher +1.50 nats", "3 tokens",
    ]  # fmt: skip


def test_a_completion_that_came_twice_and_was_not_read_says_so(see):
    unread = record(["A", " B"], [None, None])
    assert find(see(unread, unread), ".label").text.splitlines() == [
        "reward 1", "advantage +0.50", "not read by the teacher", "2 tokens", "2 times the same",
    ]  # fmt: skip


EVIL = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'><!--<script>&amp;"


def test_hostile_text_is_shown_and_does_nothing(see):
    evil = record(
        [EVIL, EVIL],
        [2.5, 0.0],
        prompt=EVIL,
        kind=EVIL,
        teacher=EVIL,
        named=[[EVIL, EVIL]] * 2,
        named_logps=[[-0.2, -3.0]] * 2,
    )
    browser = see(
        evil,
        evil | {"group": 1, "kind": "x", "teacher": "y"},
        name=EVIL,
        log=[{"step": 1, "reward": 0.5, f"eval_rewards/{EVIL}/pass@1": 0.1}],
    )
    press(browser, "n")
    assert browser.execute_script("return typeof hacked") == "undefined"
    assert (
        not browser.find_elements("css selector", "img") and len(browser.find_elements("css selector", "script")) == 2
    )
    assert find(browser, "[data-first='0']").text == EVIL and find(browser, ".prompt").text == EVIL
    assert f"teacher would say: {EVIL} 82%, {EVIL} 5%" in facts(browser) and EVIL in find(browser, "h1").text
    assert EVIL in find(browser, "[name=kind]").text


def test_a_point_of_a_curve_tells_its_value(see):
    browser = see(log=[{"step": step, "reward": step / 8} for step in (1, 2, 3)])
    point_at(browser, browser.find_elements("css selector", "circle")[1])
    assert facts(browser) == ["run, step 2: 0.25"]


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_a_telephone_shows_all_without_a_sidewards_scroll_bar(is_dark, see, browser):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    screen = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        wide = record(["y" * 300], [2.5], step=4)
        see(FAILED | {"prompt": "x" * 300}, wide, LONG, SOLVED, log=[{"step": 1, "reward": 0.5}])
        find(browser, ".s3")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        cut = "return [...document.querySelectorAll('.tokens')].filter((x) => x.scrollWidth > x.clientWidth).length"
        assert browser.execute_script(cut) == 0
        color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert color == ("rgb(20, 23, 27)" if is_dark else "rgb(255, 255, 255)")
        press(browser, "n")
        box = browser.execute_script(
            "const b = document.querySelector('#facts').getBoundingClientRect(); return [b.left, b.right]"
        )
        assert 0 <= box[0] and box[1] <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_64_completions_of_30000_tokens_open_at_once(see):
    tokens = [f" word{i % 997}" for i in range(30_000)]
    gaps = [2.5 if i % 50 < 3 else 0.0 for i in range(30_000)]
    rows = [record(tokens, gaps, group=i // 8, advantage=float(i)) for i in range(64)]
    browser = see(*rows)
    timing = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert timing < 6000  # 3 seconds on a machine that has nothing else to do
    # What isn't in sight isn't drawn
    assert browser.execute_script("return document.querySelectorAll('[data-first]').length") < 10_000
    press(browser, "p")  # the last one of all
    assert browser.switch_to.active_element.get_attribute("data-first") == "29952"
