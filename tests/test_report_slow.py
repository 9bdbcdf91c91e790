"""A browser opens the report: it loads nothing, prints no error, and fits a phone."""

import re
import shutil
import subprocess

import pandas as pd
import pytest
from test_report import assert_tables_are_those_of, write_folder

from common import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr --hide-scrollbars
--proxy-server=127.0.0.1:9 --virtual-time-budget=5000""".split()
# Chromium's own window is never as narrow as a phone, but a frame is.
PHONE = """<title></title><iframe src="{}" style="width:380px;height:2000px;border:0"></iframe><script>
onload = () => {{
  const page = frames[0], root = page.document.documentElement
  document.title = [page.innerWidth, root.scrollWidth, page.performance.getEntriesByType("resource").length]
}}
</script>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("benchmark"))
    report.write_report(folder)
    return folder


def opened(folder, name):
    """The page as the browser has it, and what the browser logs."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / name).as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def on_a_phone(folder, name):
    """The frame's width, the page's width, the files that it asked for, and what the browser logs."""
    (folder / "phone.html").write_text(PHONE.format(name), encoding="utf-8")
    html, log = opened(folder, "phone.html")
    return *map(int, re.search("<title>(.*?)</title>", html)[1].split(",")), log


def test_the_report_opens_with_the_figures_of_the_csv_asks_for_nothing_and_fits_a_phone(folder):
    html, log = opened(folder, "report.html")
    assert_tables_are_those_of(html, pd.read_csv(folder / "benchmark.csv"))
    assert "CONSOLE" not in log
    *measured, log = on_a_phone(folder, "report.html")
    assert measured == [380, 380, 0] and "CONSOLE" not in log


def test_the_browser_would_notice_a_wide_page_a_request_and_an_error(folder):
    bad = '<div style="width:999px">x</div><img src="http://127.0.0.1:9/x.png"><script>nothing()</script>'
    page = (folder / "report.html").read_text(encoding="utf-8").replace("</body>", f"{bad}</body>")
    (folder / "bad.html").write_text(page, encoding="utf-8")
    frame, width, requests, log = on_a_phone(folder, "bad.html")
    assert frame == 380 and width > 999 and requests == 1 and "CONSOLE" in log and "nothing is not defined" in log
