"""Text of others, such as names of files and clusters, shown on a terminal or in a log."""

import logging


def visible(text: str) -> str:
    r"""The text on one line that steers nothing: letters that do not print are written \n, \x1b, \u202e.

    Line breaks could forge a line of a log, escape sequences hide one or set the clipboard, and the marks of
    right-to-left writing change the order in which all that follows is read.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Visible(logging.Formatter):
    """Makes every message of a log ``visible``."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
