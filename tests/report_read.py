"""Reads what report.html says: its elements, its words, and the data for its script."""

import base64
import json
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
from PIL import Image

from deepcluster.report import write_report

VOID = {"meta", "link", "img", "input"}


class Page(HTMLParser):
    """Every element with its attributes, and the text in each; asserts that elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.scripts, self.said, self.buttons = [], [], {}, [], {}
        self.part = ""
        self.feed(text)
        self.close()
        assert not self.open
        self.data, self.gallery, self.heats = (json.loads(self.scripts[key]) for key in ("data", "gallery", "heats"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.block = attrs.get("id", "")
            assert self.block not in self.scripts
            self.scripts[self.block] = ""
        if tag == "article":
            self.part = attrs["id"]
        if tag == "section":
            self.part = attrs["id"]
        if "data-i" in attrs:
            self.buttons.setdefault(self.part, []).append(int(attrs["data-i"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self.block] += data
        elif self.open and self.open[-1] != "style":
            self.said.append(data)

    def all(self, tag, name=None):
        return [a if name is None else a[name] for t, a in self.elements if t == tag and (name is None or name in a)]

    def path(self, i):
        return self.data["prefix"] + self.data["paths"][i]

    def shown(self, part):
        return [self.path(i) for i in self.buttons.get(part, [])]

    def numbers(self, name, kind):
        return np.frombuffer(base64.b64decode(self.data[name]), kind)


def image(address):
    assert address.startswith("data:image/webp;base64,")
    return np.asarray(Image.open(BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def written(run, store=None, true=None):
    path = write_report(run, store, true)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")
