"""What the documents show runs: every `>>>` example, snippet and command. Their numbers are recorded, their links lead
somewhere.

Benchmarks that take half an hour are among the slow tests. `agentsd demo`, which runs until it is interrupted, is run
in `demo/test_serving.py`.
"""

import doctest
import importlib.util
import inspect
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import agentsd
import agentsd.bench
from agentsd.bench import load_result
from agentsd.bench.tables import fill_tables
from agentsd.cli import app
from agentsd.comparison import Comparison


ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README, BENCHMARKS = DOCUMENTS["README.md"], DOCUMENTS["docs/benchmarks.md"]
LINKING = [*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md", "apps/README.md", "agentsd/assets/emoji/README.md"]
RECORDED = (
    "shapes",
    "shapes-keys",
    "shapes-share",
    "shapes-sdxl",
    "h100",
    "h100-2048",
    "h100-sdxl",
    "quality-ddim",
    "quality-dpmpp",
    "quality-euler-a",
    "quality-phases",
    "front",
    "cpu",
    "small",
    "small-emoji",
    "paper",
    "search",
    "keys",
)
RESULTS = {name: load_result(ROOT / "notebooks" / "results" / name) for name in RECORDED}
# The rows of the README's table: results, height in pixels, methods.
SUMMARY = [
    ("shapes", 512, ("balanced", "fast", "deepcache", "attention-free")),
    ("shapes", 768, ("balanced", "fast", "deepcache", "agentsd", "todo", "tomesd", "attention-free")),
    ("h100", 512, ("balanced", "fast", "deepcache")),
    ("h100", 1024, ("balanced", "fast", "deepcache")),
    (
        "quality-ddim",
        512,
        ("balanced", "fast", "deepcache", "deepcache-5", "agentsd", "fewer-steps-50%", "fewer-steps-30%"),
    ),
]
LONG = re.compile(r"--suite (cpu|shapes|paper)|--prompts (\d\d|\S+\.txt)|--repeats 7")
MODULES = [name for _, name, is_package in pkgutil.walk_packages(agentsd.__path__, "agentsd.") if not is_package]


class FencedParser(doctest.DocTestParser):
    """Reads examples in Markdown fences, whose closing line is no expected output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"(?m)^ *```.*$", "", string), name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in ("agentsd.ops.kernels", "agentsd.ops.operators"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(parser=FencedParser()).find(module, name):
        result = runner.run(test)
        assert result.failed == 0, f"{test.name}: {result.failed} of {result.attempted} examples failed"


def public_objects():
    """Functions and classes that users meet; errors need no example."""
    for module in (agentsd, agentsd.bench):
        for name in module.__all__:
            public = getattr(module, name)
            if callable(public) and not (inspect.isclass(public) and issubclass(public, Exception)):
                yield name, public
    yield "Comparison", Comparison


def test_public_names_are_documented_with_arguments_and_examples():
    for name, public in public_objects():
        text = inspect.getdoc(public)
        assert text, name
        assert ">>> " in text, f"{name} has no example"
        if inspect.isfunction(public):
            for parameter in inspect.signature(public).parameters:
                assert f"{parameter} (" in text or f"{parameter}:" in text, f"{name} does not document {parameter}"


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", document)


@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if blocks(text, "python")])
def test_python_snippets_run(name, tmp_path, monkeypatch, emoji_128):
    monkeypatch.chdir(tmp_path)
    snippets = blocks(DOCUMENTS[name], "python")
    if importlib.util.find_spec("timm") is None:  # which is not among what developers need
        snippets = [snippet for snippet in snippets if "import timm" not in snippet]
    script = "\n".join(snippets).replace('"emoji"', repr(emoji_128))
    exec(compile(script, name, "exec"), {"__name__": "__main__"})
    if name == "README.md":
        assert "apply_patch" in script
        assert (tmp_path / "image.png").is_file()


def commands(*documents: str) -> list[str]:
    """The commands of documents, each once, without comments."""
    lines = [line for document in documents for block in blocks(document, "bash") for line in block.splitlines()]
    return list(dict.fromkeys(line.split("  #")[0].strip() for line in lines if line))


def marked(command: str) -> object:
    return pytest.param(command, marks=[pytest.mark.slow, pytest.mark.timeout(7200)] if LONG.search(command) else [])


@pytest.mark.parametrize(
    "command",
    [
        marked(line)
        for line in commands(*DOCUMENTS.values())
        if line.startswith("agentsd ") and not line.startswith("agentsd demo")
    ],
)
def test_commands_run(command, tmp_path, monkeypatch, emoji_128):
    monkeypatch.chdir(tmp_path)
    arguments = [emoji_128 if word == "emoji" else word for word in shlex.split(command)[1:]]
    if arguments[0] in ("generate", "compare", "report") and "--model" not in arguments:
        arguments += ["--model", emoji_128]
    if arguments[0] == "compare":
        arguments += ["--seconds", "0"]  # timed once
    runs = [arguments]
    if "--images-of" in arguments:  # which another run draws first, as the text says
        place = arguments.index("--images-of")
        rest = [*arguments[:place], *arguments[place + 2 :]]
        runs.insert(0, [*rest, "--repeats", "0", "--out", arguments[place + 1]])
    for run in runs:
        result = CliRunner().invoke(app, run)
        assert result.exit_code == 0, result.output


def test_other_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {"make quickstart", "make test"} <= set(commands(README))
    for line in commands(*DOCUMENTS.values(), contributing):
        if not line.startswith("agentsd "):
            assert re.fullmatch(r"make \w+", line), line
            assert f"\n{line.split()[1]}:" in makefile, line


@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if "<!-- results: " in text])
def test_tables_are_the_recorded_ones(name):
    assert fill_tables(ROOT / name) == DOCUMENTS[name], "make tables"


def test_the_table_of_the_readme_is_the_recorded_one():
    rows = []
    for name, height, methods in SUMMARY:
        result = RESULTS[name]
        at = {row.method: row for row in result.rows if row.height == height}
        rows += [summary_row(at[method], result.environment) for method in methods]
    (table,) = re.findall(r"(?m)^\| Model, size .*\n\| :-- .*\n((?:\|.*\n)+)", README)
    assert table.splitlines() == rows, "\n".join(rows)


def summary_row(row, machine) -> str:
    model = {"sd15": "SD 1.5", "sdxl": "SDXL"}.get(row.model, row.model)
    value, low, high = row.of_baseline
    fidelity = [f"{row.quality[key][0]:{form}}" if key in row.quality else "–" for key, form in FIDELITY.items()]
    assert machine["gpu"] == "NVIDIA H100 80GB HBM3" or machine["threads"] == 2  # as the text says
    processor = machine["gpu"] and " ".join(machine["gpu"].split()[:2])
    processor = processor or re.sub(r"\(R\)| Processor", "", machine["cpu"])
    cells = [
        f"{model}, {row.width}×{row.height}",
        row.method + (" †" if row.is_computed else ""),
        f"{value:.2f} ({low:.2f}–{high:.2f})",
        *fidelity,
        processor,
    ]
    return f"| {' | '.join(cells)} |"


FIDELITY = {"psnr": ".1f", "ssim": ".3f"}


def test_the_presets_that_leave_small_layers_alone_are_nowhere_slower():
    """At every shape and size recorded; `paper`, `agent` and `tome` do what the paper does."""
    rows = [row for result in RESULTS.values() for row in result.rows if row.method in ("balanced", "fast")]
    assert {row.model for row in rows} == {"emoji", "sd15", "sdxl"}
    for row in rows:
        _, low, _ = row.of_baseline
        assert low > 1, row


def test_speed_ups_in_the_text_are_recorded_ones():
    recorded = json.loads((ROOT / "notebooks/results/quickstart/comparison.json").read_text(encoding="utf-8"))
    (caption,) = re.findall(r"(?ms)^\*`make quickstart`.*?\*$", README)
    caption = caption.replace("\n", " ")
    for name, variant in recorded["variants"].items():
        low, high = variant["speed_up_interval"]
        speed = "no difference measured" if low <= 1 <= high else f"{variant['speed_up']:.2f}× ({low:.2f}–{high:.2f})"
        assert f"`{name}` {speed}, PSNR {variant['psnr']:.1f} dB" in caption
    assert f"{recorded['rounds']} rounds" in caption
    quickstart = {f"{variant['speed_up']:.2f}" for variant in recorded["variants"].values()}
    known = {
        f"{value[0]:.2f}"
        for result in RESULTS.values()
        for row in result.rows
        for value in (row.of_baseline, row.of_tomesd, row.of_free)
        if value
    }
    for name, text in DOCUMENTS.items():
        shown = quickstart | set(re.findall(r"(?m)^\| .* \| (\d\.\d\d) \(", text)) if name == "README.md" else known
        assert set(re.findall(r"\d\.\d\d(?=×)", text)) <= shown, name


@pytest.mark.parametrize("name", RESULTS)
def test_the_command_below_a_table_is_the_one_that_recorded_it(name, tmp_path, monkeypatch):
    """Nobody could reproduce the numbers otherwise."""
    below = BENCHMARKS.split(f"<!-- results: ../notebooks/results/{name} ")[1]
    command = re.search(r"(?m)^agentsd (bench .*)$", below)[1]
    asked = []

    def run_bench(settings, **options):
        asked.append(settings)
        raise RuntimeError("not now")

    monkeypatch.setattr("agentsd.bench.run_bench", run_bench)
    *command, _ = shlex.split(command)
    CliRunner().invoke(app, [*command, str(tmp_path / "out")])
    later = {"images_of": None}  # fields that came after some of the results
    assert asked[0].to_dict() == later | RESULTS[name].settings


def test_the_readme_names_the_commands_that_recorded_its_table():
    long = [line for line in commands(README) if LONG.search(line)]
    assert len(long) == len({name for name, _, _ in SUMMARY})
    assert set(long) <= set(commands(BENCHMARKS))


def test_the_readme_is_short_and_leads_to_all_documents():
    assert len(README.splitlines()) <= 200
    for name in DOCUMENTS:
        assert name == "README.md" or f"]({name})" in README, name


@pytest.mark.parametrize("name", LINKING)
def test_typography(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    # Tables keep the notes of the benchmark's report, and the model card those of its training.
    text = re.sub(r"(?s)<!-- results: .*?<!-- /results -->", "", text)
    assert name.startswith("agentsd/") or not re.search(r"\d\s%", text), "40%, not 40 %"


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^```.*?^```", "", text))


@pytest.mark.parametrize("name", LINKING)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
