"""A parser of HTML pages for tests of the reports."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    """The elements, links and text of a page; elements must nest and have no event handlers."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "xlink:href")
        ]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def images(self):
        """Decode all images to [H, W, 3] uint8."""
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",")[1]))).convert("RGB"))
            for tag, attrs in self.tags
            if tag == "img"
        ]

    def named(self, tag):
        """Return the attributes of all elements of a name."""
        return [attrs for name, attrs in self.tags if name == tag]

    def is_self_contained(self):
        """Return whether the page has no script, link or external image, and forbids them."""
        policy = next(attrs["content"] for attrs in self.named("meta") if attrs.get("http-equiv"))
        return (
            all(re.match(r"data:image/(png|jpeg);base64,", link) for link in self.links)
            and not {tag for tag, _ in self.tags} & {"script", "link", "iframe", "object", "base", "form"}
            and policy.startswith("default-src 'none'")
        )

    def text(self):
        """Return all text with single spaces."""
        return " ".join("".join(self.words).split())
