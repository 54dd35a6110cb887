"""Take the screenshot of the web page in docs/.

    python tools/screenshot_web.py http://127.0.0.1:7860 docs/images/web.png

Start `dcris web runs/quickstart` first. The script segments the second example in the system's
Chromium.
"""

import shutil
import sys

from playwright.sync_api import sync_playwright


def main(address: str, target: str, threshold: str = "0.35") -> None:
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        # The screenshot is 840 pixels wide, as a column of the documentation.
        page = browser.new_page(viewport={"width": 1200, "height": 960}, device_scale_factor=0.7, color_scheme="light")
        page.goto(address)
        page.click("#examples button >> nth=1")
        page.wait_for_selector("#picture img")
        number = page.locator("#threshold input[type=number]")
        number.fill(threshold)
        number.press("Enter")
        page.click("button#segment, #segment button")
        page.wait_for_selector("#downloads a")
        page.wait_for_timeout(2000)  # until the progress bar has faded
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
