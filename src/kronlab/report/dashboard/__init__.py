"""The dashboard: every table, figure, claim and record on one page that needs nothing but a browser.

`content` turns tables and records into plain data, `charts` and `measured` points into Vega-Lite specifications, `page`
all of it into HTML. Reads records only; what is loaded, and from where, is `kronlab.dashboard`'s.
"""

from kronlab.report.dashboard.content import Section, page_data
from kronlab.report.dashboard.page import html

__all__ = ["Section", "html", "page_data"]
