"""The web page. Needs the extra `demo`."""

from .page import build_demo, launch_demo


__all__ = ["build_demo", "launch_demo"]
