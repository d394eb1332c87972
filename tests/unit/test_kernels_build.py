"""How the native library is built: its idea of XLA's interface, and what sanitizers find in it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "puna" / "backend" / "kernels" / "src"
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.backend_free,
    pytest.mark.skipif(COMPILER is None, reason="there is no g++"),
]

# Ours and XLA's names of a struct, and of its fields.
STRUCTS = {
    "ExtensionBase Extension_Base": "struct_size type next",
    "Version Api_Version": "struct_size extension_start major_version minor_version",
    "Metadata Metadata": "struct_size api_version traits",
    "MetadataExtension Metadata_Extension": "base=extension_base metadata",
    "Buffer Buffer": "struct_size dtype data rank dims",
    "Buffers Args": "size types buffers=args",
    "Buffers Rets": "size types buffers=rets",
    "ByteSpan ByteSpan": "data=ptr size=len",
    "Scalar Scalar": "dtype value",
    "Array Array": "dtype size data",
    "Attributes Attrs": "size types names values=attrs",
    "ErrorCreateArgs Error_Create_Args": "struct_size message code=errc",
    "ScheduleArgs ThreadPool_Schedule_Args": "struct_size context=ctx task data",
    "NumThreadsArgs ThreadPool_NumThreads_Args": "struct_size context=ctx threads=num_threads",
    "CallFrame CallFrame": "extension_start api context=ctx stage arguments=args results=rets "
    "attributes=attrs",
    "Api Api": "api_version error_create=XLA_FFI_Error_Create "
    "thread_pool_schedule=XLA_FFI_ThreadPool_Schedule "
    "thread_pool_num_threads=XLA_FFI_ThreadPool_NumThreads",
}
VALUES = "S8 S32 S64 U8 F16 F32 BF16"


@pytest.mark.skipif(importlib.util.find_spec("jaxlib") is None, reason="jaxlib is not installed")
def test_the_structs_are_xlas(tmp_path):
    import jax.ffi

    checks = []
    for names, fields in STRUCTS.items():
        ours, theirs = names.split()
        for field in fields.split():
            mine, _, its = field.partition("=")
            checks.append(
                f"static_assert(offsetof(puna::xla::{ours}, {mine}) == "
                f'offsetof(XLA_FFI_{theirs}, {its or mine}), "{ours}.{mine}");'
            )
    for value in VALUES.split():
        checks.append(f'static_assert(puna::xla::k{value} == int(XLA_FFI_DataType_{value}), "");')
    checks.append("static_assert(puna::xla::kMetadata == int(XLA_FFI_Extension_Metadata));")
    checks.append("static_assert(XLA_FFI_API_MAJOR == 0);")
    source = tmp_path / "check.cpp"
    includes = '#include "xla/ffi/api/c_api.h"\n#include "xla_ffi.h"\n'
    source.write_text(includes + "\n".join(checks) + "\n")
    assert COMPILER is not None
    command = [COMPILER, "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", str(source)]
    folders = [f"-I{SOURCES}", f"-I{jax.ffi.include_dir()}"]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_sanitizers_find_nothing(tmp_path):
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DPUNA_SANITIZE=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    assert COMPILER is not None
    runtimes = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    code = (
        "import sys, pathlib, pytest, puna.backend.kernels.library as library\n"
        f"library._path = lambda: pathlib.Path({str(tmp_path / 'puna_kernels.native')!r})\n"
        "tests = ['tests/unit/test_kernels.py', 'tests/unit/test_kernels_blocks.py',\n"
        "         'tests/unit/test_kernels_training.py',\n"
        "         'tests/unit/test_kernels_full_attention.py',\n"
        "         '-q', '-p', 'no:xdist', '-k',\n"
        "         'float64 or however_many or several or rounded or number or threads']\n"
        "sys.exit(pytest.main(tests))\n"
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.soak
def test_the_wheel_builds_without_a_compiler(tmp_path):
    """It is pure Python then, says so once, and computes the same."""
    source = tmp_path / "source"
    kept = shutil.ignore_patterns(".venv", ".cache", ".git", "build", "*.native")
    shutil.copytree(ROOT, source, ignore=kept)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    none = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    subprocess.run([*pip, str(source)], env=none, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("puna-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    package = tmp_path / "package"
    zipfile.ZipFile(wheel).extractall(package)
    assert not list(package.rglob("*.native"))
    code = (
        f"import sys; sys.path.insert(0, {str(package)!r}); sys.meta_path[:] = [\n"
        "    f for f in sys.meta_path if 'editable' not in type(f).__module__.lower()]\n"
        "import warnings, numpy as np, puna.backend\n"
        "assert puna.__file__.startswith(sys.path[0]), puna.__file__\n"
        "ops = puna.backend.ops\n"
        "x, w = np.ones((2, 32), np.float32), np.ones((4, 32), np.float32)\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        x, w = map(puna.backend.keras.ops.convert_to_tensor, (x, w))\n"
        "        y = ops.linear(x, w, 'float32')\n"
        "print(float(y[1, 3]), sum('KernelsMissing' in w.category.__name__ for w in told))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["32.0", "1"], done.stdout + done.stderr
