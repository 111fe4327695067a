"""Names of the units that are ablated: one coordinate of a component's write into the residual stream."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from lib.cli import UserError

_LABEL = re.compile(r"(?:m(?P<mlp>\d+)|a(?P<attention>\d+)\.h(?P<head>\d+))\Z", re.ASCII)


class Neuron(NamedTuple):
    """Coordinate `index` (0 .. d_model-1) of what a component writes to the residual stream.

    `m12:345` is a coordinate of layer 12's MLP output, `a16.h21:7` of the output of head 21 in layer 16.
    """

    layer_label: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nothing asks a neuron for

    @property
    def layer(self) -> int:
        """Layer number."""
        return parse_label(self.layer_label)[0]

    @property
    def head(self) -> int | None:
        """Head number, or None for an MLP write."""
        return parse_label(self.layer_label)[1]

    @property
    def key(self) -> str:
        """The spelling used in column and folder names: `m12_345`, `a16_h21_7`."""
        return f"{layer_key(self.layer_label)}_{self.index}"

    @property
    def sort_key(self) -> tuple[int, bool, int, int]:
        """Layer by layer, heads before the MLP that reads them, then by index."""
        return self.layer, self.head is None, self.head or 0, self.index

    def __str__(self) -> str:
        return f"{self.layer_label}:{self.index}"


@functools.lru_cache(maxsize=65536)
def parse_label(layer_label: str) -> tuple[int, int | None]:
    """(layer, head) of a component label; head is None for an MLP."""
    match = _LABEL.match(layer_label)
    if match is None:
        raise UserError(f"{layer_label!r} is not a component; expected m<layer> or a<layer>.h<head>")
    if match["mlp"] is not None:
        return int(match["mlp"]), None
    return int(match["attention"]), int(match["head"])


def layer_key(layer_label: str) -> str:
    """The label with everything but letters and digits as underscores: `a16.h21` -> `a16_h21`."""
    return re.sub(r"[^0-9A-Za-z]+", "_", layer_label).strip("_")


def parse_neuron(text: str) -> Neuron:
    """`m12:345` or `a16.h21:7` as a `Neuron`."""
    label, separator, index = text.rpartition(":")
    if not separator or not index.isascii() or not index.isdigit():
        raise UserError(f"{text!r} is not a neuron; expected m<layer>:<index> or a<layer>.h<head>:<index>")
    parse_label(label)
    return Neuron(label, int(index))
