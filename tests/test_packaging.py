"""The packaging files agree with each other, and the Makefile and .ci/run do what the README says."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_LOCKED = ("ray",)  # extras; Ray alone would be a quarter of a gigabyte for everybody
EXTRAS = [wanted for extra, wanted in PROJECT["optional-dependencies"].items() if extra not in NOT_LOCKED]
DIRECT = [Requirement(r) for r in [*PROJECT["dependencies"], *chain(*EXTRAS)]]
SETUP_INPUTS = ("requirements.lock", "requirements-data.lock", "pyproject.toml")
# A make of our own, free of the settings of the `make test` that may have started us.
ENV = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C"}


def read_lock(name: str) -> dict[str, str]:
    """Pins of a lock file as {canonical name: version}; every line must be exactly `name==version`."""
    pins: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line)
        assert found, f"{name}: {line!r} is not name==version"
        key = canonicalize_name(found[1])
        assert key not in pins, f"{name}: {key} is pinned twice"
        pins[key] = found[2]
    return pins


LOCK = read_lock("requirements.lock")
DATA_LOCK = read_lock("requirements-data.lock")


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=directory, env=ENV, capture_output=True, text=True, timeout=120)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the Makefile, the files that set-up reads, two tables, and a finished set-up."""
    for name in ("Makefile", *SETUP_INPUTS):
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1_000_000_000, 1_000_000_000))
    (tmp_path / "configs/table").mkdir(parents=True)
    for n in (2, 11):
        (tmp_path / f"configs/table/table{n}.yaml").write_text(f"# what table {n} holds\nrows: []\n")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.stamp").touch()
    return tmp_path


# --- pins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda r: r.name)
def test_each_declared_dependency_is_locked_inside_its_range(requirement: Requirement) -> None:
    version = LOCK.get(canonicalize_name(requirement.name))
    assert version is not None, f"requirements.lock lacks {requirement.name}"
    assert requirement.specifier.contains(version), f"lock has {version}, pyproject wants {requirement.specifier}"


def test_each_range_has_a_lower_bound() -> None:
    assert [str(r) for r in DIRECT if not any(s.operator in (">=", "==") for s in r.specifier)] == []


def test_the_lock_is_the_closure_of_the_declared_dependencies() -> None:
    """Nothing is missing, nothing is superfluous, and every package gets the versions that it asks for."""
    closure = {"setuptools"}  # builds the editable install without a download
    pending = [(r, "pyproject.toml") for r in DIRECT]
    seen: set[tuple[str, str]] = set()
    problems = []
    while pending:
        requirement, wanted_by = pending.pop()
        name = canonicalize_name(requirement.name)
        closure.add(name)
        if name not in LOCK:
            problems.append(f"{wanted_by} needs {requirement}, which is not locked")
            continue
        if not requirement.specifier.contains(LOCK[name], prereleases=True):
            problems.append(f"{wanted_by} needs {requirement}, locked is {LOCK[name]}")
        distribution = importlib.metadata.distribution(name)
        if Version(distribution.version).public != LOCK[name]:
            problems.append(f"{name} {distribution.version} is installed, locked is {LOCK[name]}: run make setup")
        for extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            for line in distribution.requires or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    pending.append((needed, name))
    assert sorted(set(problems)) == []
    # A CUDA build of torch asks for the CUDA libraries besides; those are left to pip.
    assert sorted(set(LOCK) - closure) == []


def test_data_packages_are_apart_and_installed() -> None:
    assert set(DATA_LOCK).isdisjoint(LOCK)
    assert {n: importlib.metadata.version(n) for n in DATA_LOCK} == DATA_LOCK


def test_environment_yml_pins_what_the_lock_pins() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    (python,) = [d.removeprefix("python=") for d in conda if d.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert python == "3.11", "the lock is resolved for Python 3.11"

    assert pip[-1] == "-e ."
    pinned = {canonicalize_name(r.name): r for r in map(Requirement, pip[:-1])}
    assert set(pinned) == {canonicalize_name(r.name) for r in DIRECT}
    assert {n: str(r.specifier) for n, r in pinned.items()} == {n: f"=={LOCK[n]}" for n in pinned}
    assert {n: r.extras for n, r in pinned.items()} == {canonicalize_name(r.name): r.extras for r in DIRECT}


def test_requires_python_is_met_here() -> None:
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


# --- Makefile --------------------------------------------------------------------------------------------


def phony_targets(directory: Path) -> dict[str, list[str]]:
    """Every phony target that make knows, with its prerequisites, from make's own database."""
    database = make(directory, "-pnq").stdout
    names = re.search(r"^\.PHONY: (.*)$", database, re.M)
    assert names, "make knows no phony target"
    found = {}
    for name in names[1].split():
        rule = re.search(rf"^{re.escape(name)}:(.*)$", database, re.M)
        assert rule, f"{name} is phony but has no rule"
        found[name] = rule[1].split()
    return found


def test_help_lists_every_target_with_a_line(checkout: Path) -> None:
    listed = dict(re.findall(r"^  make (\S+) +(\S.*)$", make(checkout, "help").stdout, re.M))
    assert set(listed) == set(phony_targets(checkout))
    assert {"setup", "test", "lint", "reproduce-table2", "reproduce-table11"} <= set(listed)
    assert listed["reproduce-table11"] == "what table 11 holds"


def test_help_lists_the_tables_of_this_checkout() -> None:
    listed = dict(re.findall(r"^  make (reproduce-table\d+) +(\S.*)$", make(ROOT, "help").stdout, re.M))
    configs = (ROOT / "configs/table").glob("table*.yaml")
    assert set(listed) == {f"reproduce-{path.stem}" for path in configs} != set()


def test_plain_make_is_help(checkout: Path) -> None:
    assert make(checkout).stdout == make(checkout, "help").stdout


def test_every_target_but_help_makes_sure_of_the_environment(checkout: Path) -> None:
    without = [name for name, needs in phony_targets(checkout).items() if ".venv/.stamp" not in needs]
    assert without == ["help"]


def test_setup_does_nothing_when_up_to_date(checkout: Path) -> None:
    assert make(checkout, "-q", "setup").returncode == 0


@pytest.mark.parametrize("name", SETUP_INPUTS)
def test_setup_runs_again_when_an_input_changed(checkout: Path, name: str) -> None:
    os.utime(checkout / name, (4_000_000_000, 4_000_000_000))
    assert make(checkout, "-q", "setup").returncode == 1


def test_setup_names_what_it_lacks_when_there_is_no_python(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    done = make(checkout, "setup", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "no Python >= 3.11" in done.stderr
    assert "PYTHON=/path/to/python3.11" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.skipif(shutil.which("cc") is None, reason="without a C compiler set-up stops earlier, and says so")
def test_setup_that_failed_can_be_taken_up_again(checkout: Path) -> None:
    """No stamp is left, and a package cut off half-way is not taken for installed."""
    shutil.rmtree(checkout / ".venv")
    subprocess.run([sys.executable, "-m", "venv", checkout / ".venv"], check=True, timeout=100)
    (site,) = (checkout / ".venv/lib").glob("python*/site-packages")
    cut_off = site / "cut_off-1.0.dist-info"
    cut_off.mkdir()
    (cut_off / "METADATA").write_text("Metadata-Version: 2.1\nName: cut-off\nVersion: 1.0\n")
    (checkout / "requirements.lock").write_text("kronlab-has-no-such-dependency==1.0\n")
    done = subprocess.run(
        ["make", "setup"],
        cwd=checkout,
        env={**ENV, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert "kronlab-has-no-such-dependency" in done.stderr
    assert not (checkout / ".venv/.stamp").exists()
    assert not cut_off.exists()
    assert list(site.glob("pip-*.dist-info")), "a whole package was dropped"


def test_table_settings_reach_the_script(checkout: Path) -> None:
    plain = make(checkout, "-n", "reproduce-table2").stdout.split()
    assert plain == [".venv/bin/python", "scripts/tables.py", "table=table2"]
    settings = (
        "SCALE=smoke",
        "DRY_RUN=1",
        "FORCE=1",
        "RESULTS_DIR=/tmp/r",
        "ARGS=render_only=true extra=[seed=3]",
    )
    full = make(checkout, "-n", "reproduce-table11", *settings).stdout.split()
    assert full[2:] == [
        *("table=table11", "table_scale=smoke", "results.dir='/tmp/r'", "dry_run=true", "force=true"),
        *("render_only=true", "extra=[seed=3]"),
    ]
    assert make(checkout, "-n", "reproduce-table2", "DRY_RUN=0", "FORCE=").stdout.split() == plain
    known = OmegaConf.load(ROOT / "configs/tables.yaml")
    unknown = [a for a in full[3:] if OmegaConf.select(known, a.split("=")[0], default="absent") == "absent"]
    assert unknown == [], "scripts/tables.py has no such settings"


def test_a_table_that_does_not_exist_is_one_clear_line(checkout: Path) -> None:
    done = make(checkout, "-s", "reproduce-table7")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "reproduce-table7: there is no configs/table/table7.yaml; make help lists the tables there are"
    )


# --- README and .ci/run ----------------------------------------------------------------------------------


def readme_commands() -> list[str]:
    """Command lines of the README's fenced shell blocks, prompts and comments dropped."""
    # Every fence is matched, whatever its language, so that a closing one is never taken for an opening one.
    fences = re.findall(r"^```(\S*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    blocks = [text for language, text in fences if language in ("bash", "sh", "shell", "console")]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [command for line in lines if (command := re.sub(r"(^|\s+)#.*$", "", line).strip())]


def test_readme_gives_the_two_commands() -> None:
    assert {"make reproduce-table2", "make test"} <= set(readme_commands())


def test_make_targets_named_in_the_readme_exist() -> None:
    named = {word for line in readme_commands() for word in re.findall(r"\bmake ([a-z][a-z0-9-]*)", line)}
    assert sorted(named - set(phony_targets(ROOT))) == []


@pytest.mark.parametrize("with_data", [True, False])
def test_ci_runs_lint_then_the_readme_test_command_then_the_faults(tmp_path: Path, with_data: bool) -> None:
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", checkout / ".ci/run")
    (checkout / "Makefile").write_text('lint test:\n\t@echo "make $@ $(ARGS) $${KRONLAB_DATA-unset}"\n')
    data = tmp_path / "shared/data"
    if with_data:
        data.mkdir(parents=True)
    done = subprocess.run([checkout / ".ci/run"], cwd="/", env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = str(data) if with_data else "unset"
    told = [line.split() for line in done.stdout.splitlines()]
    slow = ["-m", "slow", "tests/faults"]
    assert told == [["make", "lint", seen], ["make", "test", seen], ["make", "test", *slow, seen]]


def test_ci_fails_when_lint_fails(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text("lint:\n\t@exit 1\ntest:\n\t@echo tested\n")
    done = subprocess.run([tmp_path / ".ci/run"], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "tested" not in done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_gitignore_hides_no_source() -> None:
    files = [
        str(path.relative_to(ROOT))
        for folder in ("src", "scripts", "configs", "tests", "docs", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not any(p.endswith(".egg-info") for p in path.parts)
    ]
    assert files
    done = subprocess.run(
        ["git", "check-ignore", "--stdin"],
        input="\n".join(files),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, f"git ignores {done.stdout}{done.stderr}"
