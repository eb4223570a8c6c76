"""The folder of all short runs, and the one that several tests compare with and begin from copies of."""

import os
import shutil
from pathlib import Path

import pytest

from fake_runs import few_pairs
from projected_grpo.cli import main
from short_runs import command, copied_after, folder_of


@pytest.fixture(scope="session")
def home(tmp_path_factory, svd_cache):
    """A folder in which every short run finds its caches."""
    folder = tmp_path_factory.mktemp("home")
    few_pairs(folder)
    (folder / "out").mkdir()
    (folder / "out" / "svd_cache").symlink_to(svd_cache)
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture(scope="session")
def whole(home):
    """The run that nothing happened to."""
    before = Path.cwd()
    os.chdir(home)
    try:
        with copied_after(home / "cut", 3, 5):
            assert main(command("whole")) == 0
        return folder_of("whole").absolute()
    finally:
        os.chdir(before)


@pytest.fixture
def cut(here, home, whole):
    """cut(tag, steps): a run of one's own, the whole one as it was after three or five of its six steps."""
    runs = Path("out/runs")
    return lambda tag, steps: shutil.copytree(home / "cut" / str(steps), runs / f"{whole.name}_{tag}")
