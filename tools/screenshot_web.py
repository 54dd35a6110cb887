"""Take the screenshot of the web page in docs/.

    python tools/screenshot_web.py http://127.0.0.1:7860 docs/images/web.png

Start `dcris web` first. The script segments an example in the system's Chromium.
"""

import argparse
import shutil


def main(address: str, target: str, example: int, width: int) -> None:
    """Write the screenshot."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        # By default, the screenshot is 840 pixels wide, as a column of the documentation.
        page = browser.new_page(viewport={"width": width, "height": 900}, device_scale_factor=0.7, color_scheme="light")
        page.goto(address)
        page.click(f"#examples button >> nth={example}")
        page.wait_for_function("() => document.querySelector('#phrases textarea').value")
        page.click("button#segment, #segment button")
        page.wait_for_selector("#result .legend")
        page.wait_for_timeout(2000)  # until the progress bar has faded
        page.screenshot(path=target, full_page=True)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the page")
    parser.add_argument("target", help="the image to write")
    parser.add_argument("example", type=int, nargs="?", default=1, help="its number, from 0 (default: %(default)s)")
    parser.add_argument("width", type=int, nargs="?", default=1200, help="of the page (default: %(default)s)")
    main(**vars(parser.parse_args()))
