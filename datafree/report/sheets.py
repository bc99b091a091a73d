"""Contact sheets that stand in the page: a few images of every source, small."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from datafree.proxy import ProxySet
from datafree.proxy.sheet import sheet_image

SHOWN, COLUMNS, SIDE = 32, 8, 72  # images of a source, in a row, and their longest side in pixels


@dataclass(frozen=True)
class Sheet:
    """uri: the picture itself, as a data URI"""

    title: str
    count: int
    shown: int
    uri: str
    width: int
    height: int


def proxy_sheets(proxies: ProxySet) -> list[Sheet]:
    """One sheet per source, its first images in their order."""
    found = []
    for number, report in enumerate(proxies.manifest):
        images = proxies.source(number)
        shown = min(SHOWN, len(images))
        if shown:
            sheet = sheet_image(images, shown, COLUMNS, SIDE)
            found.append(
                Sheet(f"{number + 1} {report.kind}", len(images), shown, data_uri(sheet), *sheet.size)
            )
    return found


def data_uri(sheet: Image.Image) -> str:
    """PNG or JPEG, whichever is smaller: enlarged pixels are small as the one, photographs as the other."""
    written = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        sheet.save(buffer, kind, **options)
        written[kind] = buffer.getvalue()
    kind = min(written, key=lambda each: len(written[each]))
    return f"data:image/{kind};base64,{base64.b64encode(written[kind]).decode()}"
