"""The pre-flight: what is there is OK, what is missing is named with its fix, the exit code says which."""

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from projected_grpo.cli import main
from projected_grpo.engine.model_files import POINTER
from projected_grpo.errors import UserError
from projected_grpo.verbs import doctor
from projected_grpo.verbs.doctor import CHECKS, DoctorOptions, examine, release, settings_of

DROPS_SYSTEM = (
    "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
OPTIONS = DoctorOptions(preset="smoke", device="cpu")


def finding(name, **options):
    check = {check.__name__: check for check in (*CHECKS, doctor.check_dry_run)}[f"check_{name}"]
    return examine(check, settings_of(replace(OPTIONS, **options)))


def test_a_box_that_can_run_smoke_is_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--preset=smoke", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) + 2
    assert lines[-1] == "ready: `train smoke` can start here"
    assert {line.split()[0] for line in lines[:-1]} <= {"OK", "WARN"}
    assert "dry run" in lines[-2]
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_box_without_model_and_benchmark_is_told_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "snapshot_download", lambda *a, **k: tmp_path / "cached")
    (tmp_path / "cached").mkdir()
    assert main(["doctor", "--preset=full", "--device=cpu", "--no-dry-run"]) == 1
    told = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert told["device"].startswith("FAIL") and "GPU of 96 GB" in told["device"]
    assert told["model"].startswith("FAIL") and "just download-model Qwen/Qwen3-4B" in told["model"]
    assert told["problems"].startswith("FAIL") and "ariahw/rl-rewardhacking" in told["problems"]
    assert told["pairs"].startswith("OK") and told["pool"].startswith("OK")
    assert "`train full` cannot start here" in told["of"]


def test_bad_options_are_a_users_mistake(capsys):
    assert main(["doctor", "--device=cuda:99", "--preset=smoke", "--no-dry-run"]) == 1
    assert "--device cuda:99" in capsys.readouterr().out
    assert main(["doctor", "--preset=huge"]) == 2
    assert "--preset 'huge' is not one of: smoke" in capsys.readouterr().err


Usage = namedtuple("Usage", "total used free")


def test_too_little_disk(tmp_path, monkeypatch):
    """U and Vh of Qwen3-4B's 252 Linears are 4.9e9 values, 9.8 GB in bfloat16; then come the run's files."""
    for free, status in ((13.0, "OK"), (9.7, "FAIL")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda p, free=free: Usage(1e12, 0, free * 1e9))
        found = finding("disk", preset="full", device="auto", out_dir=tmp_path / "not" / "there")
        assert found.status == status
    assert not (tmp_path / "not").exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = finding("disk", out_dir=tmp_path)
    assert found.status == "FAIL" and "Permission denied" in found.text and "--out-dir" in found.fix


def test_earlier_runs_are_counted(tmp_path):
    assert finding("empty", out_dir=tmp_path).status == "OK"
    for name, files in (("a", ("config.json", "summary.json")), ("b", ("config.json",)), ("c", ())):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "runs" / name / file).touch()
    found = finding("empty", out_dir=tmp_path)
    assert found.status == "WARN" and found.text.startswith("2 earlier runs") and "1 of them" in found.text


def shard(folder):
    """The weights in two files with an index."""
    weights = load_file(folder / "model.safetensors")
    names = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(weights)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({n: weights[n] for n, f in names.items() if f == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def only(name):
    def put(folder):
        save_file({name: torch.zeros(1)}, folder / "model.safetensors")

    return put


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: None, ""),
        (shard, ""),
        (lambda folder: (folder / "chat_template.jinja").write_text(DROPS_SYSTEM), ""),
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cut off or damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(POINTER + b"v1"), "git lfs pull"),
        (lambda folder: (shard(folder), (folder / "b.safetensors").unlink()), "lacks b.safetensors"),
        (
            lambda folder: (shard(folder), (folder / "a.safetensors").write_bytes(b"x")),
            "a.safetensors is cut",
        ),
        (lambda folder: (shard(folder), only_brackets(folder)), "lacks model.safetensors.index.json"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "chat template fails"),
        (only("transformer.h.0.attn.c_attn.weight"), "no Linear of the names"),
        (lambda folder: edit_config(folder, vocab_size=512), "the model's 512 embeddings"),
    ],
)
def test_a_model_is_ready_if_its_files_are_whole_and_write_a_prompt(tiny, tmp_path, change, says):
    tiny[0].save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    change(tmp_path)
    found = finding("model", model=str(tmp_path))
    assert found.status == ("FAIL" if says else "OK") and says in found.text and "\n" not in found.line()


def only_brackets(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_problems_that_are_too_long_for_the_model_are_none(tiny, tmp_path):
    tiny[0].save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    assert finding("problems", model=str(tmp_path)).status == "OK"
    edit_config(tmp_path, max_position_embeddings=100)
    found = finding("problems", model=str(tmp_path))
    assert found.status == "FAIL" and "0 of them with room for --max-new 32" in found.text
    (tmp_path / "tokenizer.json").unlink()
    assert finding("problems", model=str(tmp_path)).status == "OK"  # the model's own line says so


def test_a_model_that_is_not_cached():
    found = finding("model", model="nobody/no-such-model")
    assert found.status == "FAIL" and "download-model nobody/no-such-model" in found.fix
    assert finding("model", model="not a name: at all").status == "FAIL"


@pytest.mark.parametrize(
    ("free", "status", "word"), [(139, "OK", "139.0"), (60, "WARN", "nvidia-smi")], ids=["idle", "in use"]
)
def test_a_gpu_is_asked_for_its_free_memory(monkeypatch, free, status, word):
    monkeypatch.setattr(doctor, "pick_devices", lambda wanted: (torch.device("cuda"),))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 1e9, 140e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = finding("device", preset="full", device="auto")
    assert found.status == status and word in found.line()
    small = finding("device", preset="fast", device="auto")
    assert small.status == status


def test_a_gpu_that_is_too_small_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "pick_devices", lambda wanted: (torch.device("cuda"),))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (23e9, 24e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert finding("device", preset="full", device="auto").status == "WARN"
    assert finding("device", preset="fast", device="auto").status == "WARN"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (47e9, 48e9))
    assert finding("device", preset="fast", device="auto").status == "OK"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert finding("attention", device="auto").status == "WARN"


def test_a_preset_may_be_spread_over_several_gpus(monkeypatch):
    free = {"cuda:0": 48.0, "cuda:1": 48.0}
    monkeypatch.setattr(doctor, "pick_devices", lambda wanted: tuple(map(torch.device, free)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[str(device)] * 1e9, 48e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    found = finding("device", preset="full", device="cuda:0,cuda:1")
    assert found.status == "OK" and "cuda:0, 48.0 of 48.0 GB free; cuda:1, 48.0" in found.line()
    free["cuda:1"] = 20.0
    assert "nvidia-smi" in finding("device", preset="full", device="cuda:0,cuda:1").fix


class Uncontained:
    layers = {"rlimits": True, "mounts": "no user namespaces"}
    missing = {"mounts": "no user namespaces"}

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def test_missing_containment_warns_and_fails_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(doctor, "Sandbox", Uncontained)
    assert finding("sandbox").status == "WARN"
    found = finding("sandbox", sandbox="strict")
    assert found.status == "FAIL" and "no user namespaces" in found.text


def test_problems_are_read(tmp_path):
    assert finding("problems").status == "OK"
    path = tmp_path / "p.jsonl"
    path.write_text("{]")
    found = finding("problems", problems=str(path))
    assert found.status == "FAIL" and f"{path}:1" in found.text and "\n" not in found.line()


def test_problems_that_teach_nothing_are_counted(tmp_path):
    """As `train` warns of them: by a count, and the verb that tells more."""
    row = {
        "difficulty": "Easy",
        "problem_description": "Change xs in place.",
        "starter_code": "class Solution:\n    def go(self, xs: list) -> None:\n",
        "prompt": "",
        "completion": "class Solution:\n    def go(self, xs):\n        xs.sort()\n",
        "entry_point": "Solution().go",
    }
    rows = [
        row
        | {"question_id": i, "test": f"def check(candidate):\n    assert candidate(xs = [{i}]) == {expected}"}
        for i, expected in enumerate([None, None, None, 7, 8, 9])
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = finding("problems", problems=str(tmp_path / "p.jsonl"))
    assert found.status == "WARN" and found.text.startswith("6 usable problems of ")
    assert "3 solved without trying (problem 0: returning None is right)" in found.text
    assert "problems lint" in found.text


def test_the_pool_must_cover_the_problems(tmp_path):
    assert "empty, no prompt" in finding("pool", teacher_pool_dir=tmp_path).text
    row = {"problem_id": "zz", "completion": "x", "reward": 0.5, "hacked": False, "gt_pass": False}
    (tmp_path / "prompt_zz.jsonl").write_text(json.dumps(row) + "\n")
    found = finding("pool", teacher_pool_dir=tmp_path)
    assert found.status == "FAIL" and "cover 0 of" in found.text


def test_pairs_are_read(tmp_path):
    (tmp_path / "pairs.json").write_text("{}")
    assert finding("pairs", vhack_pairs_path=tmp_path / "pairs.json").status == "FAIL"
    assert finding("pairs", vhack_pairs_path=Path("nano")).status == "OK"


def test_an_old_package_is_named(monkeypatch):
    assert release("2.13.0+cpu") == (2, 13)
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.5.1")
    found = finding("software")
    assert found.status == "FAIL" and "torch" in found.fix


@pytest.mark.parametrize("trouble", [RuntimeError("no kernel image"), UserError("told"), 2], ids=str)
def test_a_dry_run_that_fails_says_why(monkeypatch, trouble):
    def broken(argv):
        if isinstance(trouble, int):
            print("error: the last words")
            return trouble
        raise trouble

    monkeypatch.setattr(doctor.train, "main", broken)
    found = finding("dry_run")
    assert found.status == "FAIL"
    assert ("the last words" if isinstance(trouble, int) else str(trouble)) in found.text
