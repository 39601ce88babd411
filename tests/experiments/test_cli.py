"""The command line from outside: one clear line for every mistake, and a run that survives being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from couplings_experiments.app import run
from couplings_experiments.files import owned

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


def table(out):
    """What must not depend on interruptions: everything but the times, the machine and the map."""
    results = json.loads((out / "results.json").read_text())
    knn = results["experiments"]["knn"]
    return {name: value for name, value in knn.items() if name not in ("seconds", "map")}


def test_unknown_names_are_answered_in_one_line(capsys, tmp_path):
    assert run(["reproduce", "nonsense", "--out", str(tmp_path / "x")]) == 1
    said = one_line(capsys.readouterr().err)
    assert "unknown experiment 'nonsense'" in said
    assert "knn" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reproduce", "--preset", "huge"], "huge"),
        (["reproduce", "--dataset", "imagenet"], "imagenet"),
        (["reproduce", "--seeds", "0"], "seeds"),
        (["reproduce", "--sedes", "3"], "--sedes"),
        (["nonsense"], "nonsense"),
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
    assert sorted(path.name for path in finished.iterdir() if path.name != ".lock") == [
        "index.html",
        "results.json",
        "retrieval",
    ]
    assert run(["reproduce", "--out", str(finished), "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    before = (finished / "index.html").read_text()
    (finished / "index.html").unlink()
    assert run(["report", "--out", str(finished)]) == 0
    assert (finished / "index.html").read_text() == before


def test_report_without_results(capsys, tmp_path):
    assert run(["report", "--out", str(tmp_path)]) == 1
    assert "no results" in one_line(capsys.readouterr().err)
    (tmp_path / "results.json").write_text('{"format": 99}')
    assert run(["report", "--out", str(tmp_path)]) == 1
    assert "another version" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_struck_in_the_middle_and_resumed_it_ends_with_the_same_table(finished, tmp_path, capsys, blow):
    out = tmp_path / "report"
    arguments = ("reproduce", "--preset", "smoke", "--out", out)
    command = [sys.executable, "-m", "couplings_experiments", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # a suite that runs in the background of a shell hands an ignored SIGINT down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    # in the last method but three: one epoch is stored, the unit is not finished
    while not list(out.glob("work/knn/neuralsort-0/epoch-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(blow)
    _, said = process.communicate(timeout=60)
    assert not (out / "results.json").exists()
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume" in one_line(said)

    assert run(list(map(str, arguments))) == 1
    assert "unfinished run" in one_line(capsys.readouterr().err)
    assert run([*map(str, arguments), "--resume", "--seeds", "2"]) == 1
    assert "started with seeds left to the preset, not 2" in one_line(capsys.readouterr().err)
    assert run(["reproduce", "--out", str(out), "--resume"]) == 0
    assert "continuing" in capsys.readouterr().out
    assert table(out) == table(finished)
    assert not (out / "work").exists()


def test_list_and_doctor(capsys):
    assert run(["list"]) == 0
    listed = capsys.readouterr().out
    for name in ("knn", "topk-pictures", "knn-search (only by name)"):
        assert name in listed
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "Threads", "Devices", "Kernels", "experiments:"):
        assert word in shown


def test_bench_explains_itself_outside_a_checkout(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["bench"]) == 1
    assert "checkout" in one_line(capsys.readouterr().err)


def test_a_missing_dependency_is_named_with_its_remedy():
    code = (
        "import sys; sys.modules['safetensors'] = None; sys.argv[1:] = ['list']; "
        "from couplings_experiments.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 1
    assert one_line(done.stderr).strip().endswith('pip install "couplings[experiments]"')
    assert "safetensors" in done.stderr


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
