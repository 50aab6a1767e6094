"""Images are drawn and judged in one run, on a GPU say, and times taken in another."""

import json
import sys
from dataclasses import replace

import pytest
from bench_runs import quality

from agentsd.bench import BenchError, BenchSettings, run_bench
from agentsd.bench.earlier_images import EarlierImages
from agentsd.bench.images import ImageJudge
from agentsd.bench.measure import CaseTimer


METHODS = ("baseline", "tomesd", "fewer-steps-50%")


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    """A run that only draws and judges, in pairs of images."""
    folder = tmp_path_factory.mktemp("drawn")
    settings = quality(model, methods=METHODS, repeats=0, batches=(2,), steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaseTimer, "_warm_up", None)
        patch.setattr("agentsd.bench.measure.time_round", None)
        return folder, settings, run_bench(settings, out=folder)


def timing(drawn, **values):
    folder, settings, _ = drawn
    return replace(settings, images_of=str(folder), repeats=2, batches=(1,), **values)


def test_without_rounds_images_are_drawn_and_judged_and_nothing_is_timed(drawn):
    folder, _, result = drawn
    assert [(row.steps, row.images, row.rounds, row.speedup) for row in result.rows] == [
        (4, 3, 0, None),
        (4, 3, 0, None),
        (2, 3, 0, None),
    ]
    assert all(0 < row.quality["ssim"][0] < 1 for row in result.rows[1:])
    assert not (folder / "rounds.jsonl").read_text()
    assert not {"median", "speed-up", "quartiles"} & set(result.cells()[0])
    assert "round" not in "".join(result.notes())
    saved = {file.name for file in result.save(folder)}
    assert not any(name.startswith("quality-speed") for name in saved)


def test_a_run_takes_over_the_images_of_an_earlier_one(drawn, monkeypatch, tmp_path):
    _, _, earlier = drawn
    monkeypatch.setattr(ImageJudge, "judge", None)
    result = run_bench(timing(drawn), out=tmp_path)
    assert [row.rounds for row in result.rows] == [2] * 3
    for row, other in zip(result.rows, earlier.rows, strict=True):
        assert (row.images, row.blank, row.identical, row.steps) == (3, 0, other.identical, other.steps)
        assert {name: row.quality[name] for name in other.quality} == other.quality
    (note,) = [note for note in result.notes() if note.startswith("images: ")]
    assert note == f"images: drawn and judged in another run, on {earlier.machine()}"
    before = (tmp_path / "cases.jsonl").read_text()
    assert run_bench(timing(drawn), out=tmp_path, resume=True) == result
    assert (tmp_path / "cases.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1}, "drew other images: seed differ"),
        ({"steps": 6, "dtype": "bfloat16"}, "drew other images: steps, dtype differ"),
        ({"options": {"max_downsample": 2}}, "drew other images: options differ"),
        ({"methods": (*METHODS, "agentsd")}, "has no images of agentsd 0.4"),
        ({"ratios": (0.5,)}, "drew other images: ratios differ"),
    ],
)
def test_other_images_are_refused_before_anything_runs(drawn, values, message, monkeypatch, tmp_path):
    monkeypatch.setattr(CaseTimer, "time", None)
    with pytest.raises(BenchError, match=message):
        run_bench(timing(drawn, **values), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_methods_that_merge_elsewhere_on_that_device_are_refused_until_a_number_is_named(drawn, tmp_path):
    folder, settings, _ = drawn
    there = json.loads((folder / "environment.json").read_text()) | {"device": "cuda", "gpu": "a GPU"}
    rows = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    rows.append(rows[0] | {"method": "balanced"})
    (tmp_path / "environment.json").write_text(json.dumps(there))
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ask(**values):
        asked = replace(settings, **values)
        drew = replace(asked, methods=(*METHODS, "balanced"))
        (tmp_path / "settings.json").write_text(json.dumps(drew.to_dict()))
        earlier = EarlierImages(tmp_path, asked, {"dtype": "float32", "device": "cpu"})
        return [earlier.numbers(case)["images"] for (case, *_) in asked.groups()]

    with pytest.raises(BenchError, match=r"than 16384 tokens .* there, .* than 2048 here, by balanced\."):
        ask(methods=(*METHODS, "balanced"))
    with pytest.raises(BenchError, match=r"here, by agentsd\."):
        ask(methods=("agentsd",), options={"min_tokens": "auto"})
    assert ask(methods=(*METHODS, "balanced"), options={"min_tokens": 2048}) == ask(methods=METHODS) == [3]


def test_a_method_that_could_not_run_has_no_images(drawn, tmp_path):
    folder, _, _ = drawn
    for name in ("settings.json", "environment.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    rows = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    rows[1]["reason"] = "tomesd is not installed"
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BenchError, match=r"has no images of tomesd 0\.4"):
        run_bench(replace(timing(drawn), images_of=str(tmp_path)))


def test_a_method_that_is_not_installed_costs_one_row_there_too(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    baseline, tomesd = run_bench(quality(model, methods=("baseline", "tomesd"), repeats=0), out=tmp_path).rows
    assert baseline.reason is None
    assert "not installed" in tomesd.reason


def test_how_many_steps_fit_needs_times(model):
    for values in ({"repeats": 0}, {"images_of": "earlier"}):
        with pytest.raises(BenchError, match="`fewer-steps` takes follows from times"):
            quality(model, methods=("baseline", "fewer-steps"), **values)


def test_a_suite_without_images_has_rounds_and_no_earlier_images():
    with pytest.raises(BenchError, match="`repeats` must be at least 1"):
        BenchSettings(repeats=0)
    with pytest.raises(BenchError, match="has no use for `images_of`"):
        BenchSettings(images_of="earlier")
