"""Sessions of the monorepo. `nox` runs every check; `nox -l` lists the others.

Sessions run on the interpreter that runs nox. Suites that need no torch also run on the other
Pythons found on the machine. Every installation passes `-c constraints.txt`. An environment with
torch takes two gigabytes, so sessions share one, which the session `environment` makes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
CONSTRAINTS = str(ROOT / "constraints.txt")
FOLDERS = sorted(p.parent for p in ROOT.glob("*/*/pyproject.toml"))
PROJECTS = {
    nox.project.load_toml(folder / "pyproject.toml")["project"]["name"]: folder
    for folder in FOLDERS
}
OTHER_PYTHONS = ("3.10", "3.12")
TORCH_FREE = ("blockell-format", "blockell-dashboard")
# tested by themselves: one must run where there is no torch, the other has large extras
BY_THEMSELVES = ("blockell-dashboard", "titanmac-integration")


# -- which local packages a package needs, read from its metadata ---------------------------------


def metadata(name: str) -> dict:
    return nox.project.load_toml(PROJECTS[name] / "pyproject.toml")["project"]


def local_closure(name: str, extras: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """`name` and the local packages it needs, with the extras asked for; dependencies first."""
    found: dict[str, set[str]] = {}

    def visit(current: str, wanted: set[str]) -> None:
        project = metadata(current)
        lines = list(project.get("dependencies", []))
        for extra in wanted:
            lines += project["optional-dependencies"][extra]
        for requirement in map(Requirement, lines):
            if canonicalize_name(requirement.name) in PROJECTS:
                visit(requirement.name, set(requirement.extras))
        found.setdefault(current, set()).update(wanted)

    visit(name, set(extras))
    return found


def install(session: nox.Session, names: dict[str, tuple[str, ...]], tools=()) -> None:
    """Install local packages (name: extras) editable, what they need, and `tools`, in one go."""
    closure: dict[str, set[str]] = {}
    for name, extras in names.items():
        for local, wanted in local_closure(name, extras).items():
            closure.setdefault(local, set()).update(wanted)
    targets = []
    for local, wanted in closure.items():
        suffix = f"[{','.join(sorted(wanted))}]" if wanted else ""
        targets += ["-e", f"{PROJECTS[local]}{suffix}"]
    session.install("-c", CONSTRAINTS, "hatchling", "editables")
    session.install("-c", CONSTRAINTS, "--no-build-isolation", *targets, *tools)


def test_tools(name: str) -> list[str]:
    toml = nox.project.load_toml(PROJECTS[name] / "pyproject.toml")
    return [*nox.project.dependency_groups(toml, "test"), "pytest-xdist"]


def works(python: str) -> bool:
    """Whether this interpreter really starts (a version manager's shim may exist and fail)."""
    path = shutil.which(f"python{python}")
    if path is None:
        return False
    return subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0


def activate_pyenv() -> None:
    """Let the shims of pyenv, where it is in use, start all versions it has installed."""
    if not shutil.which("pyenv"):
        return
    ask = [["pyenv", "version-name"], ["pyenv", "versions", "--bare"]]
    answers = [subprocess.run(a, capture_output=True, text=True, check=False) for a in ask]
    if not any(answer.returncode for answer in answers):
        current, *others = [line for answer in answers for line in answer.stdout.split()]
        os.environ["PYENV_VERSION"] = ":".join([*current.split(":"), *others])


def all_extras(name: str) -> tuple[str, ...]:
    return tuple(metadata(name).get("optional-dependencies", {}))


# -- the environment that sessions share ----------------------------------------------------------


@nox.session(default=False)
def environment(session: nox.Session) -> None:
    """What types, docs, demo and most tests run in; made when one of them asks for it."""
    names = {name: () if name in BY_THEMSELVES else all_extras(name) for name in PROJECTS}
    tools = {tool for name in PROJECTS if name not in BY_THEMSELVES for tool in test_tools(name)}
    install(session, names, [*sorted(tools), "mypy", "sybil"])


IN_SHARED = {"venv_backend": "none", "requires": ["environment"]}


def shared(session: nox.Session, program: str) -> str:
    """The path of a program of that environment."""
    folder = session.cache_dir.resolve().parent / "environment"
    return str(folder / ("Scripts" if os.name == "nt" else "bin") / program)


# -- checks of the whole tree ---------------------------------------------------------------------


@nox.session(tags=["checks"])
def lint(session: nox.Session) -> None:
    """ruff: lint and format."""
    session.install("-c", CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(tags=["checks"])
def imports(session: nox.Session) -> None:
    """import-linter: who may import whom."""
    session.install("-c", CONSTRAINTS, "import-linter")
    sources = os.pathsep.join(str(folder / "src") for folder in FOLDERS)
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})


@nox.session(tags=["checks"], **IN_SHARED)
def types(session: nox.Session) -> None:
    """mypy --strict on every package."""
    session.run(shared(session, "mypy"), *(str(folder / "src") for folder in FOLDERS))


# -- tests ----------------------------------------------------------------------------------------


def run_tests(session: nox.Session, pytest: str, *arguments: str) -> None:
    workers = ["-n", str(min(4, os.cpu_count() or 1))]
    if "-n" in session.posargs or "-k" in session.posargs:
        workers = []
    session.run(
        pytest,
        "-m",
        "not gpu",
        *workers,
        *arguments,
        *session.posargs,
        f"--rootdir={ROOT}",
        "-c",
        str(ROOT / "pyproject.toml"),
        # one thread per worker: two cores serve two workers
        env={"OMP_NUM_THREADS": "1"},
    )


def add_test_session(name: str) -> None:
    options = {} if name in BY_THEMSELVES else IN_SHARED

    @nox.session(name=f"test-{name}", tags=[name, "tests"], **options)
    def test(session: nox.Session) -> None:
        if name == "blockell-dashboard":
            ensure_browser(session)
        pytest = "pytest"
        if name in BY_THEMSELVES:
            install(session, {name: all_extras(name)}, test_tools(name))
        else:
            pytest = shared(session, "pytest")
        run_tests(session, pytest, str(PROJECTS[name] / "tests"))

    test.__doc__ = f"Tests of {name}."


activate_pyenv()


def add_torch_free_session(name: str) -> None:
    pythons = [python for python in OTHER_PYTHONS if works(python)]
    if not pythons:
        return

    @nox.session(name=f"test-{name}-other", python=pythons, tags=[name, "tests"])
    def test(session: nox.Session) -> None:
        install(session, {name: ()}, test_tools(name))
        run_tests(session, "pytest", str(PROJECTS[name] / "tests"), "-m", "not gpu and not browser")

    test.__doc__ = f"Tests of {name} without torch on other Pythons."


for project in sorted(PROJECTS, key=lambda name: len(local_closure(name))):
    add_test_session(project)
    if project in TORCH_FREE:
        add_torch_free_session(project)


def ensure_browser(session: nox.Session) -> None:
    """On a CI machine that lets us, install the browser the dashboard is tested with."""
    on_ci = os.environ.get("CI") and hasattr(os, "geteuid") and os.geteuid() == 0
    if shutil.which("chromium") or not on_ci or not shutil.which("apt-get"):
        return
    session.run("apt-get", "update", "-qq", external=True, success_codes=[0, 100], silent=True)
    session.run(
        *("apt-get", "install", "-y", "-qq", "chromium"),
        external=True,
        success_codes=[0, 100],
        silent=True,
    )


@nox.session(tags=["tests"], **IN_SHARED)
def docs(session: nox.Session) -> None:
    """Run every example of the README files and of docs/."""
    run_tests(session, shared(session, "pytest"), str(ROOT / "docs" / "tests"))


# -- the main job, and looking at it --------------------------------------------------------------


@nox.session(default=False, **IN_SHARED)
def demo(session: nox.Session) -> None:
    """The main job: arithmetic, then prose, remembering it or not. A few minutes."""
    arguments = ["--preset", "demo", "--out", str(free_name(Path("runs/demo"))), *session.posargs]
    session.run(shared(session, "titanmac"), "continual", *arguments)


def free_name(path: Path) -> Path:
    """`path`, or with a number behind it when a run lies there already: runs are kept."""
    names = (path.with_name(f"{path.name}-{i}") for i in range(2, 10**6))
    return path if not path.exists() else next(name for name in names if not name.exists())


@nox.session(default=False)
def dashboard(session: nox.Session) -> None:
    """Open run directories: nox -s dashboard -- RUN_DIR."""
    install(session, {"blockell-dashboard": ()})
    session.run("blockell-dashboard", *(session.posargs or ["runs"]))


# -- releases and GPU machines --------------------------------------------------------------------


@nox.session(default=False, reuse_venv=False)
def wheels(session: nox.Session) -> None:
    """Build every wheel and sdist; test the wheels in an empty environment, outside the tree."""
    session.install("-c", CONSTRAINTS, "build", "hatchling")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for folder in FOLDERS:
        session.run("python", "-m", "build", "--no-isolation", "-o", str(dist), str(folder))
    names = [f"{name}[{','.join(all_extras(name))}]".replace("[]", "") for name in PROJECTS]
    tools = sorted({tool for name in PROJECTS for tool in test_tools(name)})
    session.install("-c", CONSTRAINTS, "--find-links", str(dist), *names, *tools)
    work = Path(session.create_tmp()).resolve()
    for name, folder in PROJECTS.items():
        shutil.rmtree(work / name, ignore_errors=True)
        shutil.copytree(folder / "tests", work / name / "tests")
    shutil.copy(ROOT / "pyproject.toml", work)
    session.chdir(work)
    for name in PROJECTS:
        session.run(
            *("pytest", "-c", str(work / "pyproject.toml"), f"--rootdir={work}"),
            *("-m", "not gpu", "-n", str(min(4, os.cpu_count() or 1)), f"{name}/tests"),
            env={"OMP_NUM_THREADS": "1"},
        )
    session.chdir(ROOT)
    shutil.rmtree(session.virtualenv.location)


def source_path() -> dict[str, str]:
    """GPU machines often bring their own torch: run from the checkout, install nothing."""
    return {"PYTHONPATH": os.pathsep.join(str(folder / "src") for folder in FOLDERS)}


@nox.session(default=False, venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Tests that need a GPU, with the torch that is installed."""
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs, env=source_path())


@nox.session(default=False, venv_backend="none")
def bench(session: nox.Session) -> None:
    """Benchmark of the kernels, with the torch that is installed."""
    session.run("python", "-m", "blockell_kernels.bench", *session.posargs, env=source_path())
