"""The page as one file: data, style and scripts inlined; a policy in its head lets a browser load nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Final

from kronlab.errors import ConfigError

_PARTS: Final = "kronlab.report.dashboard"
_SNIPPET: Final = "window.vegaEmbed = vegaEmbed;"


def html(data: Mapping[str, Any], *, results: str) -> str:
    """The page.

    Args:
        data: as `kronlab.report.dashboard.page_data` makes it.
        results: the results directory as seen from where the page will lie; links to records begin with it.

    Raises:
        ConfigError: vl-convert-python, which carries the plotting library, is not installed.
    """
    text = json.dumps({**data, "results": results}, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    scripts = {"chart-library": _guarded(plotting_library()), "program": _guarded(_part("page.js"))}
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(_hash(script) for script in scripts.values())}"
    )
    inlined = {
        "POLICY": policy,
        "STYLE": _part("page.css"),
        "DATA": text.replace("<", "\\u003c"),  # no label can end the script
        "LIBRARY": scripts["chart-library"],
        "PROGRAM": scripts["program"],
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: inlined[place[1]], _part("page.html"))


@cache  # bundling takes seconds
def plotting_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets `vegaEmbed`."""
    try:
        import vl_convert
    except ImportError as error:
        raise ConfigError("the dashboard needs vl-convert-python: pip install 'kronlab[dashboard]'") from error
    return str(vl_convert.javascript_bundle(_SNIPPET))


def _part(name: str) -> str:
    return resources.files(_PARTS).joinpath(name).read_text(encoding="utf-8")


def _guarded(script: str) -> str:
    """A script that may stand in HTML: nothing in it can end its element."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
