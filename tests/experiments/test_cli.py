"""The command line from outside: one clear line for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from html_pages import check_site

from couplings_experiments import doctor, environment
from couplings_experiments.app import run
from couplings_experiments.experiment import PRESETS, Request, discover
from couplings_experiments.files import owned, write_json
from couplings_experiments.report.page import read_results
from couplings_experiments.run import reproduce

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def one_line(text):
    assert text.count("\n") == 1, text
    return text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete smoke run of everything, made in this process."""
    out = tmp_path_factory.mktemp("finished") / "report"
    assert run(["reproduce", "--preset", "smoke", "--out", str(out)]) == 0
    return out


def test_unknown_names_are_answered_in_one_line(capsys, tmp_path):
    assert run(["reproduce", "nonsense", "--out", str(tmp_path / "x")]) == 1
    said = one_line(capsys.readouterr().err)
    assert "unknown experiment 'nonsense'" in said
    assert "Did you mean" not in said
    assert "knn" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("typed", "meant"), [("knnn", "knn"), ("topk_pictures", "topk-pictures"), ("Ranking", "ranking")]
)
def test_a_name_that_is_nearly_right_is_recognised(capsys, tmp_path, typed, meant):
    assert run(["reproduce", typed, "--out", str(tmp_path / "x")]) == 1
    assert f"Did you mean {meant}?" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reproduce", "--preset", "huge"], "huge"),
        (["reproduce", "--dataset", "imagenet"], "imagenet"),
        (["reproduce", "--seeds", "0"], "seeds"),
        (["reproduce", "--sedes", "3"], "--sedes"),
        (["nonsense"], "nonsense"),
        (["reproduse"], "reproduce"),
        (["report", "a", "b", "c"], "c"),
    ],
)
def test_usage_errors_name_the_mistake(capsys, arguments, said):
    assert run(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_device_that_is_not_there(capsys, tmp_path):
    for device in ("cuda:99", "warp"):
        assert run(["reproduce", "--device", device, "--out", str(tmp_path)]) == 1
        assert f"--device {device} is not available" in one_line(capsys.readouterr().err)
    assert not list(tmp_path.glob("*.json"))


def test_missing_data_leaves_nothing_to_resume(capsys, tmp_path):
    for _ in range(2):
        arguments = [
            "reproduce",
            "knn",
            "--dataset",
            "mnist",
            "--data-dir",
            str(tmp_path),
            "--out",
            str(tmp_path / "o"),
        ]
        assert run(arguments) == 1
        assert "train-images-idx3-ubyte" in one_line(capsys.readouterr().err)


def test_a_folder_of_data_that_nobody_would_read(capsys, tmp_path):
    assert run(["reproduce", "knn", "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]) == 1
    assert "Add --dataset (mnist" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


def test_out_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(["reproduce", "--preset", "smoke", "--out", str(out)]) == 1
        assert "--out" in one_line(capsys.readouterr().err)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_out_without_permission(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert run(["reproduce", "--preset", "smoke", "--out", str(tmp_path / "x")]) == 1
    assert "no permission" in one_line(capsys.readouterr().err)


def test_a_full_disk_is_one_line(capsys, tmp_path, monkeypatch):
    import couplings_experiments.files as files

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_atomic", full)
    assert run(["reproduce", "topk-pictures", "--preset", "smoke", "--out", str(tmp_path)]) == 1
    assert "disk full" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "results.json").exists()


def test_a_directory_in_use_is_refused(capsys, tmp_path):
    with owned(tmp_path):
        assert run(["reproduce", "--preset", "smoke", "--out", str(tmp_path)]) == 1
    assert "another run" in one_line(capsys.readouterr().err)


def test_a_finished_run(finished, capsys):
    shown = {f"{name}.html" for name, experiment in discover().items() if experiment.by_default}
    assert {path.name for path in finished.iterdir() if path.name != ".lock"} == {
        "index.html",
        "results.json",
        "retrieval",
        *shown,
    }
    assert run(["reproduce", "--out", str(finished), "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    site = {path.name: path.read_text() for path in finished.glob("*.html")}
    check_site(site)
    every = read_results(finished)
    assert set(every["seconds"]) == set(every["experiments"])
    assert sum(every["seconds"].values()) <= every["elapsed_seconds"]


def test_the_site_is_drawn_again_from_the_results(tmp_path, capsys):
    arguments = ["reproduce", "topk-pictures", "--preset", "smoke", "--out", str(tmp_path)]
    assert run(arguments) == 0
    site = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert set(site) == {"index.html", "topk-pictures.html"}
    (tmp_path / "index.html").unlink()
    (tmp_path / "knn.html").write_text("of a former run")
    capsys.readouterr()
    assert run(["report", str(tmp_path)]) == 0
    assert one_line(capsys.readouterr().out) == f"Wrote {tmp_path / 'index.html'}\n"
    assert {path.name: path.read_text() for path in tmp_path.glob("*.html")} == site
    assert run(["report", str(tmp_path), str(tmp_path)]) == 0
    assert one_line(capsys.readouterr().out) == "No difference in 1 figure of 1 experiment.\n"
    assert run(["report", str(tmp_path), str(tmp_path), "--out", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c" / "compare.html").exists()


def test_report_without_results(capsys, tmp_path):
    for arguments in ([str(tmp_path)], [str(tmp_path), str(tmp_path / "other")]):
        assert run(["report", *arguments]) == 1
        assert "no results" in one_line(capsys.readouterr().err)
    write_json(tmp_path / "results.json", {"format": 99})
    assert run(["report", str(tmp_path)]) == 1
    assert "another version" in one_line(capsys.readouterr().err)
    assert run(["report", "--out", str(tmp_path)]) == 1
    assert f"couplings report {tmp_path}" in one_line(capsys.readouterr().err)


def test_the_time_left_is_that_of_all_experiments(tmp_path):
    class Heard:
        total, done, said = 0.0, 0.0, ()

        def expect(self, steps):
            self.total += steps

        def advance(self, steps, what):
            assert steps >= 0
            self.done += steps
            assert self.done <= self.total + 1e-9
            self.said = (*self.said, what)

        def say(self, line):
            pass

    heard = Heard()
    names = ("topk-pictures", "ordering-pictures")
    request = Request(names, "smoke", "digits", None, None, "cpu")
    reproduce(request, tmp_path, resume=False, progress=heard, given=frozenset())
    assert heard.total == pytest.approx(sum(discover()[name].minutes["smoke"] for name in names))
    assert heard.done == pytest.approx(heard.total)
    assert heard.said[0].startswith("topk-pictures: ")


def test_list(capsys):
    assert run(["list"]) == 0
    listed = capsys.readouterr().out
    for name, experiment in discover().items():
        assert f"{name} " in listed
        assert set(experiment.minutes) in (set(), set(PRESETS))
    assert "(only" in listed  # and its words, which a narrow terminal may put on two lines


def diagnosed(capsys):
    """The doctor's exit status, its remarks by topic, and all it said."""
    status = run(["doctor"])
    said = capsys.readouterr().out
    remarks, topic = {}, ""
    for line in said.splitlines():
        if line.startswith(" "):
            remarks[topic] = line.strip()
        else:
            topic = line[:18].strip()
    return status, remarks, said


def test_a_doctor_with_nothing_to_complain_of(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, remarks, said = diagnosed(capsys)
    assert (status, remarks) == (0, {})
    for word in (
        "torch",
        "Threads",
        "Devices",
        "Kernels",
        "Pooling",
        "Linear algebra",
        "Extra experiments",
        "Memory",
    ):
        assert word in said
    assert "report has no results yet" in said
    assert said.endswith("No problem found: couplings reproduce can run.\n")


def test_a_doctor_names_each_problem_and_its_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lacking = {"experiments": ["rich", "num2words"], "bench": ["POT"]}
    monkeypatch.setattr(environment, "missing_extras", lambda: lacking)
    monkeypatch.setattr(environment, "memory", lambda: 2**29)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    with owned(make(tmp_path / "report")):
        status, remarks, said = diagnosed(capsys)
    assert status == 1
    assert remarks["Extra experiments"].endswith('Run: pip install "couplings[experiments]"')
    assert remarks["Extra experiments"].startswith("PROBLEM")
    assert "Extra bench" not in remarks
    assert remarks["Disk"].startswith("PROBLEM")
    assert remarks["Memory"].startswith("note: ")
    assert "another run" in remarks["Report"]
    assert said.endswith("2 problems: see above.\n")


def test_a_doctor_in_a_directory_of_another_run_or_of_another_user(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "report" / "work")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    status, remarks, said = diagnosed(capsys)
    assert status == 1
    assert "Permission denied" in said
    assert "--out" in remarks["Directory"]
    assert "--resume" in remarks["Report"]


def make(path):
    path.mkdir(parents=True)
    return path


def test_bench_explains_itself_outside_a_checkout(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["bench"]) == 1
    assert "checkout" in one_line(capsys.readouterr().err)


def without(module, *arguments):
    """The command line in a process where ``module`` is not installed."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = {list(arguments)!r}; "
        "from couplings_experiments.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )


def test_a_missing_dependency_is_named_with_its_remedy():
    done = without("safetensors", "list")
    assert done.returncode == 1
    assert 'needs safetensors, which is not installed. Run: pip install "couplings[experiments]"' in one_line(
        done.stderr
    )


def test_the_doctor_needs_no_extra():
    done = without("typer", "doctor")
    assert done.stderr == ""
    assert "Extra experiments" in done.stdout


def test_the_library_does_not_import_the_experiments():
    code = (
        "import sys, couplings; "
        "print([m for m in ('typer', 'rich', 'jinja2', 'sklearn', 'matplotlib', 'safetensors', 'filelock', "
        "'couplings_experiments') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    assert done.stdout.strip() == "[]"
