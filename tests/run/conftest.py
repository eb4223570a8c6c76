"""The folder of all short runs, and those that several tests begin from: made once, copied for each."""

import functools
import os
import shutil
from pathlib import Path

import pytest

from fake_runs import few_pairs
from projected_grpo.cli import main
from short_runs import command, cut_short, folder_of


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
        assert main(command("whole")) == 0
        return folder_of("whole").absolute()
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def gone_after():
    """The folder of a run that was gone after so many steps, tagged `cut` and their number; to be copied."""
    return functools.cache(lambda steps: cut_short(f"cut{steps}", steps))


@pytest.fixture
def cut(here, gone_after):
    """cut(tag, steps): a run of one's own that was gone after so many steps."""

    def copy(tag, steps):
        original = gone_after(steps)
        return shutil.copytree(original, original.with_name(f"{original.name}_{tag}"))

    return copy
