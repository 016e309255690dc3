"""What `pip install` brings: built, unpacked, and run away from the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    [found] = folder.glob("simreg-*.whl")
    return found


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [about] = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(about).decode())
    package = {name for name in names if ".dist-info/" not in name}
    files = (path for path in (ROOT / "src").rglob("*") if path.is_file())
    here = {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert package == {name for name in here if "__pycache__" not in name}
    assert {"simreg/py.typed", "simreg/study/report.html.template"} <= package
    assert any(name.endswith("licenses/LICENSE") for name in names)
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert len(needed) == 1
    assert needed[0].startswith("torch>=")


def test_it_trains_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, home = tmp_path / "site packages", tmp_path / "home"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    home.mkdir()
    text = home / "text.txt"
    text.write_text("".join(f"the cat and hat number {i % 7} of {i % 5}\n\n" for i in range(400)))

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        given = os.environ | {"PYTHONPATH": str(site), "HOME": str(home)}
        done = subprocess.run(command, cwd=home, env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ("--model.layers", "2", "--model.hidden-size", "32", "--data.seq-len", "32")
    steps = ("--train.tokens", "256", "--train.batch-rows", "4", "--train.eval-tokens", "64")
    bpe = ("--data.tokenizer", "bpe:270", "--data.validation-fraction", "0.3")
    train = ("-m", "simreg", "train", "--data.source")
    python(*train, "text.txt", *bpe, *small, *steps, "--out", "run")
    assert (home / "run" / "model" / "config.json").is_file()
    versions = json.loads((home / "run" / "result.json").read_text())["versions"]
    assert versions["commit"].startswith("files-")  # so it was not the checkout's
    advice = "from simreg.recipe.errors import to_install; print(to_install('eval'))"
    assert python("-c", advice) == "install simreg with its extra 'eval'\n"
