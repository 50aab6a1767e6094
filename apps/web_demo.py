"""The web page as a program and as a Hugging Face Space. `agentsd demo` is the same with options."""

from pathlib import Path

from agentsd.demo import build_demo, launch_demo
from agentsd.demo.engine import Engine


if __name__ == "__main__":
    recorded = sorted(file.parent for file in Path(__file__).parent.glob("results/*/cases.jsonl"))
    launch_demo(build_demo(Engine(), recorded))
