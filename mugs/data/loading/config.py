"""Choices of the loading path; none of them changes a number."""

from typing import Literal

LoaderName = Literal["auto", "thread", "ffcv"]
RendererName = Literal["fast", "reference"]
