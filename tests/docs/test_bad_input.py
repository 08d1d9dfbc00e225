"""Places that cannot be written, numbers that are none, overrides that are wrong: said at once, with what to do."""

import os

import pytest

from twin.cli import _code
from twin.commands import run as run_command
from twin.spec.errors import SpecError
from twin.spec.load import load_scenario
from twin.spec.rundir import check_out, write_text


def eptwin(capsys, *arguments):
    code = _code(list(arguments))
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return code, told.out, told.err


def test_a_device_is_written_into_and_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 100) == b"text" and not pipe.is_file()
    os.close(reader)
    (tmp_path / "link").symlink_to(tmp_path / "named")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "named").read_text() == "text"
    with pytest.raises(SpecError, match="directory"):
        write_text(tmp_path, "text")


def test_places_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_command, "execute", lambda *_: pytest.fail("worked first"))
    monkeypatch.setattr(run_command, "calibrate_plans", lambda *_, **__: pytest.fail("worked first"))
    file = tmp_path / "file"
    file.write_text("mine")
    for arguments in (
        ("run", "tiny_cpu", "--out", str(file)), ("calibrate", "tiny_cpu", "--out", str(file / "sub")),
        ("simulate", "tiny_cpu", "--out", str(file)), ("demo", "--out", str(file)), ("plan", "tiny_cpu", "--out", str(file)),
        ("simulate", "tiny_cpu", "--out", "x" * 300), ("import", "model", "deepseek-r1", "--out", str(tmp_path)),
        ("import", "model", "deepseek-r1", "--out", str(tmp_path / "no" / "model.yaml")),
    ):  # fmt: skip
        code, out, err = eptwin(capsys, *arguments)
        assert (code, out) == (2, "") and "cannot write" in err, (arguments, out, err)
    assert file.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file"]
    assert check_out(tmp_path / "new" / "run") == tmp_path / "new" / "run"


@pytest.mark.parametrize(
    "arguments",
    [
        ("watch", "http://127.0.0.1:1", "tiny_cpu", "--every", "nan"),
        ("watch", "http://127.0.0.1:1", "tiny_cpu", "--band", "nan"),
        ("validate", "run", ".", "--band", "nan"), ("bench", "http://127.0.0.1:1", "--rate", "nan"),
        ("run", "tiny_cpu", "--timeout", "nan"), ("calibrate", "tiny_cpu", "--budget", "nan", "--out", "x"),
        ("serve", "tiny_cpu", "--stall-timeout", "nan"), ("demo", "--budget", "nan"),
    ],
)  # fmt: skip
def test_nan_is_in_no_range(arguments, capsys):
    code, _, err = eptwin(capsys, *arguments)
    assert code == 2 and "nan is not a number" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "x" * 5000), "name too long"), (("validate", "pair", "x" * 5000, "y"), "name too long"),
        (("serve", "x" * 300 + ".json"), "name too long"),
        (("validate", "pair", "missing.json", "y"), "missing.json: no such file"),
        (("validate", "step", "--model", "deepseek-r1", "--batch", "1", "--context", "9", "--tp", "3"), "128 heads"),
        (("validate", "step", "--model", "deepseek-r1", "--batch", "1", "--context", "9", "--profile", "."), "holds no profile"),
        (("simulate", "tiny_cpu", "--set", "workload.slo.ttft_s=0", "--check-slo"), "greater than 0"),
        (("simulate", "tiny_cpu", "--set", "profile=" + "x" * 5000), "name too long"),
    ],
)  # fmt: skip
def test_words(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = eptwin(capsys, *arguments)
    assert code == 2 and out == "" and words.lower() in err.lower()


def test_no_terminal_takes_orders_from_a_file(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("id,backend,model_path,system,mode,isl,osl\n\x1b[31mred,vllm,\x1b[2Jx,h200,agg,9,9\n")
    (tmp_path / "a.yaml").write_text('- {id: "\\e[31mred", metric: "x\\e[2Jy", value: 1, unit: s}\n')
    for file in ("a.csv", "a.yaml"):
        code, out, _ = eptwin(capsys, "validate", "against", str(tmp_path / file))
        assert code == 0 and "red" in out and "\x1b" not in out


def test_a_wrong_override_is_not_blamed_on_a_line_of_the_file():
    with pytest.raises(SpecError) as told:
        load_scenario("tiny_cpu", ["workload.requests=-1", "plan.pools.0.tp=0"])
    text = str(told.value)
    assert "it comes from --set workload.requests=-1" in text and "it comes from --set plan.pools.0.tp=0" in text
    assert ".yaml:" not in text.replace(".yaml: ", "")
    assert "at least 1 item" not in text  # the pool is wrong, not missing
    with pytest.raises(SpecError, match="at least 1 item"):
        load_scenario("tiny_cpu", ["plan.pools=[]"])


def test_files_of_overrides_are_looked_for_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loads.csv").write_text("1,2\n")
    for text in ("routing={kind: matrix, file: loads.csv}", "routing.file=loads.csv"):
        found = load_scenario("tiny_cpu", ["routing.kind=matrix", text])
        assert found.routing.file == str(tmp_path / "loads.csv")
    (tmp_path / "deepseek-r1").mkdir()  # a preset's name stays one
    assert load_scenario("tiny_cpu", ["model=deepseek-r1"]).model.name == "deepseek-r1"


def test_a_rank_without_a_gpu_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from runtime.options import EngineOptions
    from runtime.rank import _device

    assert _device(EngineOptions(), 1).type == "cpu"
    with pytest.raises(SpecError, match="no CUDA device"):
        _device(EngineOptions(device="cuda", backend="triton"), 0)


def test_a_profile_without_a_place(tmp_path):
    from twin.cost.profile import dump_profile, load_store

    with pytest.raises(SpecError, match="cannot write"):
        dump_profile(next(iter(load_store())), tmp_path / "no" / "profile.json")
    assert not list(tmp_path.iterdir())
